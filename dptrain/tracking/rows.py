"""The columns of a step's row in metrics.jsonl, and the figures of a whole run in summary.json."""

from __future__ import annotations

from collections.abc import Mapping

from dptrain.noise import NoiseScale
from dptrain.tracking.jsonl import Value
from dptrain.tracking.run_log import group_columns, noise_columns


def train_row(
    columns: Mapping[str, Value], *, noise_scale: NoiseScale, groups: Mapping[str, NoiseScale]
) -> dict[str, Value]:
    """Return the row of one optimizer step: its own columns, then the noise scale, whole and by group."""
    return {"kind": "train", **columns, **noise_columns(noise_scale), **group_columns(groups)}


def noise_scale_text(scale: NoiseScale) -> str:
    """Say the noise scale now and the mean over the window, each under its own name, of a run at its end."""
    if scale.num_steps == 0:
        return "noise scale not measured"
    window = "not resolved" if scale.window_mean is None else f"{scale.window_mean:.3g}"
    return f"noise scale now {scale}; running mean: {window}"


def noise_figures(scale: NoiseScale) -> dict[str, Value]:
    """Return the noise scale at the end of a run, for its summary."""
    return {
        "noise_scale": scale.value,
        "noise_scale_lower": scale.lower,
        "noise_scale_upper": scale.upper,
        "noise_scale_window_mean": scale.window_mean,
        "noise_scale_text": noise_scale_text(scale),
        "noise_scale_warnings": "; ".join(scale.warnings),
        "resolved": str(scale.state),
    }
