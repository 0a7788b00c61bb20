"""Do two replicas that codistil predict better than one model at equal samples, and how stale may predictions be?"""
# python -m benchmarks.exchange --parts codistillation [--quick]: this is a part of that benchmark
#
# mnist1d in a loop of its own with `Codistillation`, AdamW at a constant rate that grows with the root of the batch.
# One model takes the whole batch of a step, each of two replicas a half: the same samples, and the same steps. All are
# evaluated twenty times on the way, and the lowest held-out loss counts: later they learn the training set by heart.

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from benchmarks.replicas import run_replicas
from dptrain.exchange import Codistillation, Exchange
from dptrain.tasks import resolve_task

BATCHES = (256, 1024)
STALENESS = (0, 10, 100)
_RATE, _BATCH_OF_RATE = 3e-3, 64
_NUM_SAMPLES = 128_000
_NUM_EVALUATIONS = 20
_SHARED_SAMPLES = 64


def measure(*, quick: bool) -> list[dict[str, Any]]:
    """Return a row for each batch and arm: means over the seeds."""
    seeds, num_samples = (1, 16_000) if quick else (3, _NUM_SAMPLES)
    batches = BATCHES[:1] if quick else BATCHES
    rows: list[dict[str, Any]] = run_replicas(_one, world_size=1, args=(batches, seeds, num_samples))
    rows += run_replicas(_two, world_size=2, args=(batches, seeds, num_samples))
    return rows


def measure_rates(*, quick: bool) -> list[dict[str, Any]]:
    """Return a row for one model at each batch and rate: that of two replicas need not be its best."""
    seeds, num_samples = (1, 16_000) if quick else (3, _NUM_SAMPLES)
    rows: list[dict[str, Any]] = run_replicas(
        _rates, world_size=1, args=(BATCHES[:1] if quick else BATCHES, seeds, num_samples)
    )
    return rows


def figures_of_rates(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the lowest loss of one model over the rates, at each batch."""
    batches = dict.fromkeys(row["batch"] for row in rows)
    return {
        f"one_model_best_nll_{batch}": min(row["loss"] for row in rows if row["batch"] == batch) for batch in batches
    }


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return at each batch the loss of two replicas over that of one model, by staleness; below 1 it pays."""
    found: dict[str, float] = {}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        by_arm = {row["arm"]: row["loss"] for row in rows if row["batch"] == batch}
        for staleness in STALENESS:
            arm = _arm(staleness)
            if arm in by_arm:
                found[f"codistilled_{staleness}_over_one_nll_{batch}"] = by_arm[arm] / by_arm["one model"]
    return found


def _arm(staleness: int) -> str:
    return f"codistilled, staleness {staleness}"


def _one(rank: int, _world_size: int, batches: Sequence[int], seeds: int, num_samples: int) -> list[dict[str, Any]]:
    return [
        _row("one model", lambda: Codistillation(0.0), rank, batch=batch, seeds=seeds, num_samples=num_samples)
        for batch in batches
    ]


def _rates(rank: int, _world_size: int, batches: Sequence[int], seeds: int, num_samples: int) -> list[dict[str, Any]]:
    rows = []
    for batch, factor in itertools.product(batches, (0.25, 0.5, 1.0, 2.0)):
        options: dict[str, Any] = {"batch": batch, "seeds": seeds, "num_samples": num_samples, "factor": factor}
        rows.append(_row(f"one model, rate × {factor:g}", lambda: Codistillation(0.0), rank, **options))
    return rows


def _two(rank: int, _world_size: int, batches: Sequence[int], seeds: int, num_samples: int) -> list[dict[str, Any]]:
    rows = []
    for batch, staleness in itertools.product(batches, (None, *STALENESS)):
        if 2 * (staleness or 0) > num_samples // batch:
            continue  # most steps would have no predictions
        name = "member of two" if staleness is None else _arm(staleness)

        def make(staleness: int | None = staleness) -> Exchange:
            if staleness is None:
                return Codistillation(0.0)
            return Codistillation(1.0, staleness=staleness, predictions="probabilities")

        rows.append(_row(name, make, rank, batch=batch, seeds=seeds, num_samples=num_samples))
    return rows


def _row(
    arm: str, make: Callable[[], Exchange], rank: int, *, batch: int, seeds: int, num_samples: int, factor: float = 1.0
) -> dict[str, Any]:
    options: dict[str, Any] = {"batch": batch, "num_samples": num_samples, "factor": factor}
    runs = [_train(make(), rank, seed=seed, **options) for seed in range(seeds)]
    losses = [run["loss"] for run in runs]
    return {
        "arm": arm,
        "batch": batch,
        "samples": num_samples,
        "seeds": seeds,
        "losses": losses,
        "loss": statistics.mean(losses),
        "accuracy": statistics.mean(run["accuracy"] for run in runs),
    }


def _train(
    exchange: Exchange, rank: int, *, batch: int, seed: int, num_samples: int, factor: float
) -> dict[str, float]:
    """Return loss and accuracy at the evaluation with the lowest loss, a mean over the replicas."""
    torch.manual_seed(seed + 1000 * rank)
    task = resolve_task("mnist1d", options={})
    model = task.model
    exchange.wrap(model)
    inputs, classes = cast("TensorDataset", task.train_data).tensors

    def shared(called: nn.Module, step: int) -> Tensor:
        drawn = torch.Generator().manual_seed(10_000 * seed + step)
        picked = torch.randint(len(inputs), (_SHARED_SAMPLES,), generator=drawn)
        return functional.cross_entropy(called(inputs[picked]), classes[picked])

    exchange.share(shared)
    optimizer = torch.optim.AdamW(model.parameters(), lr=factor * _RATE * (batch / _BATCH_OF_RATE) ** 0.5)
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    num_steps = num_samples // batch
    found = []
    for step in range(1, num_steps + 1):
        picked = torch.randint(len(inputs), (batch // exchange.num_replicas,), generator=generator)
        functional.cross_entropy(model(inputs[picked]), classes[picked]).backward()  # type: ignore[no-untyped-call]
        exchange.combine()
        optimizer.step()
        exchange.updated()
        optimizer.zero_grad()
        if step * _NUM_EVALUATIONS // num_steps > (step - 1) * _NUM_EVALUATIONS // num_steps:
            found.append(_held_out(model, task, num_replicas=exchange.num_replicas))
    return min(found, key=lambda one: one["loss"])


def _held_out(model: nn.Module, task: Any, *, num_replicas: int) -> dict[str, float]:  # noqa: ANN401 - a Task whose data are tensors
    inputs, classes = task.eval_data.tensors
    with torch.no_grad():
        logits = model(inputs)
    loss, hits = functional.cross_entropy(logits, classes), (logits.argmax(-1) == classes).float().mean()
    both = torch.stack([loss, hits])
    if num_replicas > 1:
        torch.distributed.all_reduce(both)
    return {"loss": both[0].item() / num_replicas, "accuracy": both[1].item() / num_replicas}
