"""Do redrawn random bases train to a higher accuracy than fixed ones, and to a lower one than all directions?"""
# python -m benchmarks.exchange --random-bases [--quick]: this is a part of that benchmark

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.replicas import run_replicas
from dptrain.exchange import AllReduce, Exchange, RandomBases
from dptrain.tasks import Task, resolve_task

SIZES = (8, 16, 32, 64)
"""Directions; the models have 2,410 (digits) and 15,210 (mnist1d) parameters."""
RATES = (0.03, 0.1, 0.3, 1.0)
"""Of the gradient's own length: of D parameters d directions hold d/D of its square, so steps are scaled by D/d."""
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        task: name.
        kind: fixed, redrawn or full.
        size: directions; 0 for full.
    """

    task: str
    kind: str
    size: int = 0


def train(
    arm: Arm, *, rate: float, seed: int, num_steps: int, num_replicas: int = 1, rank: int = 0
) -> dict[str, float]:
    """Return the held-out accuracy and loss after so many steps of plain SGD."""
    torch.manual_seed(seed)
    task = resolve_task(arm.task, options={})
    model = task.model
    exchange: Exchange = (
        AllReduce() if arm.kind == "full" else RandomBases(arm.size, redraw=arm.kind == "redrawn", seed=seed)
    )
    exchange.wrap(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    scale = 1.0 if arm.kind == "full" else num_parameters / (arm.size * num_replicas)
    # Directions of K replicas add up, so that they are as many as one replica with K times as many would have: their
    # mean is taken back to the sum. By the root of the scale: a step's length, and not its mean, is what must not grow.
    optimizer = torch.optim.SGD(model.parameters(), lr=rate * num_replicas * math.sqrt(scale))
    data: Any = task.train_data
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    for _ in range(num_steps):
        picked = torch.randint(len(data), (_BATCH // num_replicas,), generator=generator)
        loss: Any = task.loss(model, tuple(tensor[picked] for tensor in data.tensors))
        loss.backward()
        exchange.combine()
        optimizer.step()
        exchange.updated()
        optimizer.zero_grad()
    return held_out(task, model)


def held_out(task: Task, model: nn.Module) -> dict[str, float]:
    """Return accuracy and cross-entropy over the held-out set."""
    inputs, classes = task.eval_data.tensors  # type: ignore[union-attr]
    with torch.no_grad():
        logits = model(inputs)
    return {
        "accuracy": (logits.argmax(-1) == classes).double().mean().item(),
        "loss": nn.functional.cross_entropy(logits, classes).item(),
    }


STEPS = {"digits": 300, "mnist1d": 400}
"""Steps of each task, with batches of 64."""


def order(*, tasks: Sequence[str], sizes: Sequence[int], seeds: int) -> tuple[list[dict[str, Any]], bool]:
    """Return a row for each task and size, and whether fixed < redrawn < full at each of them and each seed.

    Rates are searched for each arm on seed 0, by accuracy; the other seeds take the rate that was found.
    """
    rows, holds = [], True
    for task in tasks:
        num_steps = STEPS[task]
        full = _accuracies(Arm(task=task, kind="full"), seeds=seeds, num_steps=num_steps)
        for size in sizes:
            fixed, redrawn = (
                _accuracies(Arm(task=task, kind=kind, size=size), seeds=seeds, num_steps=num_steps)
                for kind in ("fixed", "redrawn")
            )
            held = [f < r < a for f, r, a in zip(fixed, redrawn, full, strict=True)]
            holds = holds and all(held)
            means = {
                name: sum(found) / len(found)
                for name, found in (("fixed", fixed), ("redrawn", redrawn), ("full", full))
            }
            rows.append({"task": task, "size": size, **means, "seeds_in_order": sum(held), "seeds": seeds})
            print(rows[-1], flush=True)
    return rows, holds


def _accuracies(arm: Arm, *, seeds: int, num_steps: int) -> list[float]:
    tried = {rate: train(arm, rate=rate, seed=0, num_steps=num_steps)["accuracy"] for rate in RATES}
    best = max(tried, key=lambda rate: tried[rate])
    others = [train(arm, rate=best, seed=seed, num_steps=num_steps)["accuracy"] for seed in range(1, seeds)]
    return [tried[best], *others]


def replicas(*, num_steps: int, size: int = 16, rate: float = 0.3) -> list[dict[str, float]]:
    """Return loss and accuracy on digits after equal steps of a batch of 64 on 1, 2 and 4 replicas."""
    found = []
    for number in (1, 2, 4):
        result = run_replicas(_train, world_size=number, args=(size, rate, num_steps))
        found.append({"replicas": number, **result})
        print(found[-1], flush=True)
    return found


def _train(rank: int, world_size: int, size: int, rate: float, num_steps: int) -> dict[str, float]:
    arm = Arm(task="digits", kind="redrawn", size=size)
    return train(arm, rate=rate, seed=0, num_steps=num_steps, num_replicas=world_size, rank=rank)
