"""The critical batch size of small arms by `branch`: from the middle of a run on with multiples of the batch."""

from __future__ import annotations

import contextlib
import io
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learners.kept_runs import kept_or_made, known_of
from benchmarks.learners.runs import Arm, config_of
from dptrain.cli.branch import branch_arguments, trunks
from dptrain.cli.settings import parse
from dptrain.config.filled_in import given
from dptrain.explain.model.branching import branched
from dptrain.train import CheckpointConfig, Trainer

MULTIPLES = (1, 2, 4, 8)
TOLERANCE = 0.01
"""How much worse a held-out loss may be, in nats: the default of `branch`."""
_WINDOW = 0.25
"""Samples of a branch, as a part of those of the run."""


def branch_once(arm: Arm, *, seed: int, folder: Path, shared: Path, kept: Path | None) -> dict[str, Any]:
    """Return what `critical_batch` returns: what is kept, where its settings are the same; else it is trained and kept.

    The arguments are those of `train_once`.
    """
    known = {
        "branch": {"multiples": list(MULTIPLES), "window": _WINDOW, "tolerance": TOLERANCE},
        **known_of(arm, seed=seed, shared=shared),
    }
    return kept_or_made(known, lambda: critical_batch(arm, seed=seed, folder=folder), kept=kept)


def has_samples_for_branches(arm: Arm) -> bool:
    """Return whether a branch has samples for a step of the largest batch."""
    samples, batch = int(arm.settings["max_samples"]), int(arm.settings["global_batch_size"])
    return round(_WINDOW * samples) >= MULTIPLES[-1] * batch


def critical_batch(arm: Arm, *, seed: int, folder: Path) -> dict[str, Any]:
    """Train an arm to the middle of its run, and branches from there; return their losses and the critical batch.

    Returns:
        `losses` by multiple, `largest` (the largest batch that is no worse), `below` (the smallest that is worse, or
        None), and `only_below`, whether already twice the batch is worse.
    """
    settings = dict(arm.settings)
    batch, length = settings["global_batch_size"], settings["max_samples"]
    middle = length // 2 // batch * batch
    settings["checkpoint"] = CheckpointConfig(every_samples=middle, keep=1)
    with contextlib.redirect_stdout(io.StringIO()):
        steps = Trainer(config_of(settings, seed=seed, folder=folder)).steps()
        while next(steps).end < middle:
            pass
        steps.close()
        (trunk,) = trunks(folder, steps=None)
        window = round(_WINDOW * length)
        options = Namespace(run=folder, window_samples=window, rule="square_root", replicas=1, cpu=False)
        losses = {}
        for multiple in MULTIPLES:
            to = folder / "branches" / f"x{multiple}"
            config, _ = parse(branch_arguments(trunk, multiple=multiple, options=options, folder=to)[1:])
            summary: Any = given(Trainer(config).run())
            losses[multiple] = float(summary["eval_loss"])
            shutil.rmtree(to)
    result = branched(losses, tolerance=TOLERANCE)
    return {
        "losses": {str(multiple): loss for multiple, loss in losses.items()},
        "largest": batch * result.largest_multiple,
        "below": None if result.first_worse is None else batch * result.first_worse,
        "only_below": result.only_below,
    }


def critical_text(results: Sequence[Mapping[str, Any]]) -> str:
    """Return what the seeds say, one after the other: the largest batch that is no worse, or the bound on it."""
    return ", ".join(
        f"< {result['below']}"
        if result["only_below"]
        else f"≥ {result['largest']}"
        if result["below"] is None
        else str(result["largest"])
        for result in results
    )
