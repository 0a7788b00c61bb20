"""Do members of an ensemble, and replicas that codistil, predict better than one model of equal compute?"""
# python -m benchmarks.exchange --parts members [--quick]: this is a part of that benchmark

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from benchmarks.replicas import run_replicas
from dptrain.exchange import ExchangeConfig
from dptrain.tasks import Task, resolve_task
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, TrainConfig, Trainer

_BATCH = 64
ARMS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "one model": (1, {}),
    "ensemble of 2": (2, {"kind": "ensemble", "predictions": "probabilities"}),
    "ensemble of 4": (4, {"kind": "ensemble", "predictions": "probabilities"}),
    "member of 2": (2, {"kind": "codistillation", "weight": 0.0}),
    "codistilled, staleness 0": (2, {"kind": "codistillation", "staleness": 0, "predictions": "probabilities"}),
    "codistilled, staleness 10": (2, {"kind": "codistillation", "staleness": 10, "predictions": "probabilities"}),
    "codistilled, staleness 100": (2, {"kind": "codistillation", "staleness": 100, "predictions": "probabilities"}),
}
"""Replicas and settings; all arms see the same number of samples together, so each of K replicas a K-th of them."""


def task() -> Task:
    """Build mnist1d with accuracy and calibration error of torchmetrics."""
    built = resolve_task("mnist1d", options={})

    def outputs(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logits = model(batch[0])
        return functional.cross_entropy(logits, batch[1]), (logits.softmax(-1), batch[1])

    metrics = {"accuracy": MulticlassAccuracy(10, average="micro"), "calibration": MulticlassCalibrationError(10)}
    for name, value in (("metrics", metrics), ("outputs", outputs), ("eval_loss", None)):
        object.__setattr__(built, name, value)
    return built


def train(_rank: int, _world_size: int, folder: str, settings: dict[str, Any], num_samples: int, seed: int) -> Any:  # noqa: ANN401 - of run_replicas
    """Train one arm and return its summary."""
    config = TrainConfig(
        run_dir=folder,
        seed=seed,
        max_samples=num_samples,
        global_batch_size=_BATCH,
        micro_batch_size=16,
        device="cpu",
        exchange=ExchangeConfig(**settings),
        control=ControlConfig(law="constant", mode="off"),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        checkpoint=CheckpointConfig(every_samples=10**9),
        log=LogConfig(tracker="none", eval_every_samples=10**9, print_every_steps=10**6),
    )
    Trainer(config, task=task).run()
    return json.loads((Path(folder) / "summary.json").read_text()) if _rank == 0 else None


def compare(*, num_samples: int, seeds: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return figures, and a row for each arm: means over the seeds."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (replicas, settings) in ARMS.items():
            found = []
            for seed in range(seeds):
                run = str(Path(folder) / f"{name}-{seed}".replace(" ", "_"))
                arguments = (run, dict(settings), num_samples, seed)
                found.append(run_replicas(train, world_size=replicas, args=arguments))
            losses = [one["eval_loss"] for one in found]
            row = {"arm": name, "replicas": replicas, "samples": num_samples, "seeds": seeds, "losses": losses}
            means = {
                key: statistics.mean(one[key] for one in found) for key in ("eval_loss", "accuracy", "calibration")
            }
            rows.append({**row, **means})
            print(rows[-1], flush=True)
    by_name = {row["arm"]: row for row in rows}
    alone, together = by_name["member of 2"]["losses"], by_name["codistilled, staleness 0"]["losses"]
    figures = {
        "ensemble_2_over_one_nll": by_name["ensemble of 2"]["eval_loss"] / by_name["one model"]["eval_loss"],
        "ensemble_4_over_one_nll": by_name["ensemble of 4"]["eval_loss"] / by_name["one model"]["eval_loss"],
        "codistilled_over_member_nll": statistics.mean(b / a for a, b in zip(alone, together, strict=True)),
    }
    return figures, rows
