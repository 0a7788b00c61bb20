"""What do local updates cost in loss at equal samples, and does the spread of the replicas follow the noise?"""
# python -m benchmarks.exchange --parts local_updates [--quick]: this is a part of that benchmark
#
# Plain SGD at a constant rate on digits, a loop of its own with `LocalUpdates`. tr(Σ) and |G|² are exact, from the
# gradient of every training sample at the common parameters from which a round begins.

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import TensorDataset

from benchmarks.replicas import run_replicas
from dptrain.exchange import LocalUpdates
from dptrain.tasks import KnownAnswer, resolve_task

EVERY = (1, 8, 32)
"""Steps from one exchange to the next."""
REPLICAS = (2, 4)
_BATCH = 64
_NUM_STEPS = 320
_RATES = (0.02, 0.2)
Outer = Literal["average", "nesterov"]
_NUM_SPREADS = 10
"""Rounds of a run at which the spread is compared."""


def measure(*, quick: bool) -> list[dict[str, Any]]:
    """Return a row for each number of replicas, outer optimizer, H and rate: means over the seeds."""
    seeds = 1 if quick else 2
    rows: list[dict[str, Any]] = []
    for number in REPLICAS[:1] if quick else REPLICAS:
        rows += run_replicas(_measure, world_size=number, args=(seeds, _NUM_STEPS // 5 if quick else _NUM_STEPS))
    return rows


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the loss at the largest H over that at H = 1, and how far the spread is from the formula at each H."""
    averaged = [row for row in rows if row["outer"] == "average"]
    found: dict[str, float] = {}
    for number in dict.fromkeys(row["replicas"] for row in averaged):
        best = {every: min(row["loss"] for row in averaged if _is(row, number, every)) for every in EVERY}
        found[f"local_{EVERY[-1]}_over_1_loss_{number}"] = best[EVERY[-1]] / best[1]
    slow = [row for row in averaged if row["rate"] == _RATES[0]]
    for every in EVERY:
        ratios = [row["spread_over_formula"] for row in slow if row["every"] == every]
        found[f"spread_over_formula_{every}"] = statistics.mean(ratios)
    return found


def _is(row: Mapping[str, Any], number: int, every: int) -> bool:
    return bool(row["replicas"] == number and row["every"] == every)


def _measure(rank: int, world_size: int, seeds: int, num_steps: int) -> list[dict[str, Any]]:
    arms = [("average", every) for every in EVERY] + [("nesterov", EVERY[-1])]
    rows = []
    for outer, every in arms:
        for rate in _RATES:
            options: dict[str, Any] = {"outer": outer, "every": every, "rate": rate, "num_steps": num_steps}
            runs = [_train(rank, world_size, seed=seed, **options) for seed in range(seeds)]
            means = {key: statistics.mean(run[key] for run in runs) for key in ("loss", "accuracy")}
            rows.append({"replicas": world_size, "seeds": seeds, **options, **runs[0], **means})
    return rows


def _train(
    rank: int, world_size: int, *, outer: Outer, every: int, rate: float, num_steps: int, seed: int
) -> dict[str, float]:
    torch.manual_seed(seed)
    task = resolve_task("digits", options={})
    model = task.model
    exchange = LocalUpdates(every, outer=outer)
    exchange.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    train_data, eval_data = cast("TensorDataset", task.train_data), cast("TensorDataset", task.eval_data)
    pixels, classes = train_data.tensors
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    size = _BATCH // world_size
    rounds = num_steps // every
    # Rank 0 alone looks, since its parameters are those of all at the beginning of a round; and on one seed, since the
    # gradients of all samples take longer than the run.
    looks = rank == 0 and seed == 0
    compared = set(range(0, rounds, -(-rounds // _NUM_SPREADS))) if looks else set()
    ratios, scales = [], []
    for step in range(num_steps):
        if step % every == 0 and step // every in compared:
            exact = exact_noise(model, pixels, classes)
            scales.append(exact.simple_noise_scale)
            formula = rate**2 * every * exact.noise_trace / size * (1 - 1 / world_size)
        picked = torch.randint(len(pixels), (size,), generator=generator)
        functional.cross_entropy(model(pixels[picked]), classes[picked]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        exchange.updated()
        if (step + 1) % every == 0 and step // every in compared:
            spread = exchange.spread
            assert spread is not None
            ratios.append(spread / formula)
    held_out, labels = eval_data.tensors
    with exchange.evaluating(model) as (mean, _), torch.no_grad():
        logits = mean(held_out)
    return {
        "loss": functional.cross_entropy(logits, labels).item(),
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "spread_over_formula": statistics.mean(ratios) if ratios else 0.0,
        "noise_scale": statistics.geometric_mean(scales) if scales else 0.0,
    }


def exact_noise(model: nn.Module, inputs: Tensor, classes: Tensor) -> KnownAnswer:
    """Return |G|² and tr(Σ) over independent draws from a set, from the gradient of each sample in it."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, values, (sample[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, classes)
    flat = torch.cat([part.flatten(1) for part in each.values()], dim=1).double()
    variance, mean = torch.var_mean(flat, 0, correction=0)
    return KnownAnswer(grad_sq_norm=float(mean.square().sum()), noise_trace=float(variance.sum()))
