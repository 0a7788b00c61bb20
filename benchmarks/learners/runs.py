"""One way to train, and a run of it in this process."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dptrain.errors import ConfigError
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.plan import make_plan
from dptrain.explain.record import read_run
from dptrain.tracking.jsonl import read_rows
from dptrain.train import (
    CheckpointConfig,
    ControlConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    Trainer,
)

REPLICAS = (8, 64)
"""Numbers of replicas that each run is planned for."""
_NEVER = 10**9
_EARLY = 0.2


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        way: the question that it belongs to.
        name: of the arm.
        control: name of the arm of the same way that it is compared with; None for a control.
        settings: of the run.
    """

    way: str
    name: str
    control: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def train(arm: Arm, *, seed: int, folder: Path) -> dict[str, Any]:
    """Return the figures of one run of an arm; noise scales in samples are medians over a part of the run, or None."""
    summary = run(arm.settings, seed=seed, folder=folder)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    end = float(summary["samples_seen"])
    scales = [
        (_number(row["progress/samples"]) / end, _number(row["noise_scale/value"]))
        for row in rows
        if row.get("noise_scale/value") is not None
    ]
    early = [scale for part, scale in scales if _EARLY / 2 <= part <= 1.5 * _EARLY]
    late = [scale for part, scale in scales if part >= 1 - _EARLY]
    return {
        "loss": summary["eval_loss"],
        "accuracy": summary.get("accuracy"),
        "seconds": summary["wall_s"],
        "flops": summary["flops"],
        "sparse_flops": summary.get("sparse_flops"),
        "noise_early": statistics.median(early) if early else None,
        "noise_late": statistics.median(late) if late else None,
        "gradient_bytes": 4 * summary["num_trained"],
        "speed_up": {str(number): speed_up(folder, number) for number in REPLICAS},
    }


def speed_up(folder: Path, num_replicas: int) -> float | str:
    """Return how many times faster than one replica `plan` says that a number of them come to the run's lowest loss.

    Where it refuses, its sentence.
    """
    try:
        record = read_run(folder)
        found = make_plan(record, devices(record), numbers=(1, num_replicas))
    except ConfigError as error:
        return str(error)
    alone, many = found.points
    return alone.seconds / many.seconds


def _number(value: Any) -> float:  # noqa: ANN401 - of a row
    return float(value)


def run(settings: Mapping[str, Any], *, seed: int, folder: Path) -> dict[str, Any]:
    """Train in this process; a folder that is there already is another seed's, and goes."""
    if folder.exists():
        shutil.rmtree(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(config_of(settings, seed=seed, folder=folder))
        trainer.run()
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    model = trainer._bare_model  # noqa: SLF001 - nothing else tells what is trained
    return {**found, "num_trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}


def config_of(settings: Mapping[str, Any], *, seed: int, folder: Path) -> TrainConfig:
    """Return the settings of a run that measures each second step, at a constant batch."""
    return TrainConfig(
        **{
            "run_dir": str(folder),
            "seed": seed,
            "device": "cpu",
            "control": ControlConfig(law="constant", mode="measure"),
            "noise": NoiseConfig(every=2),
            "optimizer": OptimizerConfig(),
            "checkpoint": CheckpointConfig(every_samples=_NEVER, keep=1),
            "log": LogConfig(tracker="none", print_every_steps=_NEVER, eval_every_samples=_NEVER),
            **settings,
        }
    )
