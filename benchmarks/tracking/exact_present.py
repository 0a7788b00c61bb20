"""Real trainings beside their exact noise scale at present, from all per-sample gradients; nothing is judged here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, default_collate

import dptrain
from dptrain.noise import NoiseScale
from dptrain.noise.drift import now_steps
from dptrain.tasks import Task, digits, exact_noise, pysource
from dptrain.tasks.base import split_loss

_NUM_SMALL = 2
_WARMUP_SHARE, _FINAL_FRACTION = 0.02, 0.1
_CHUNK = 256
NUM_EXACT = 5
"""Iterates of the present whose every sample is differentiated alone; the others give their mean gradient only."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training whose noise is known exactly: it draws with replacement from a small set of samples.

    Attributes:
        name: of the run.
        task: model, loss and data.
        num_samples: of the data are used, evenly spread; so many gradients are the whole truth.
        learning_rate: at the top of its schedule, a cosine to a tenth after a short warm-up.
        batch: in samples, in two micro-batches.
        num_steps: of the run.
        seed: of the draws; the weights have it, too.
    """

    name: str
    task: Task
    num_samples: int
    learning_rate: float
    batch: int
    num_steps: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a run printed at one moment, and what was true.

    Attributes:
        step: of the run.
        printed: the noise scale now.
        window: the mean over the window; None where that is not resolved.
        exact: φ of the mean |G|² and tr(Σ) over the iterates of the present.
        exact_of_five: the same from five of them alone, evenly spread.
    """

    step: int
    printed: NoiseScale
    window: float | None
    exact: float
    exact_of_five: float


def trainings(*, seed: int, num_steps: int) -> list[Training]:
    """Return the four runs of the benchmark: two language models, an LSTM among them, and an autoencoder twice."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {"batch": 32, "num_steps": num_steps}
    return [
        Training(
            name="pysource",
            task=pysource(width=32, depth=2, context=32),
            num_samples=1024,
            learning_rate=2e-3,
            seed=seed,
            **shared,
        ),
        Training(
            name="pysource-lstm",
            task=pysource(model="lstm", width=64, depth=1, context=32),
            num_samples=1024,
            learning_rate=2e-3,
            seed=seed + 1,
            **shared,
        ),
        *(
            Training(
                name=f"digits-autoencoder, lr {rate:g}",
                task=digits(model="autoencoder"),
                num_samples=1497,
                learning_rate=rate,
                seed=seed + 2 + number,
                **shared,
            )
            for number, rate in enumerate((5e-3, 2e-3))
        ),
    ]


def compared(training: Training, *, num_points: int) -> list[Point]:
    """Train, and return what was printed and true after each `1/num_points` of the run."""
    task = training.task
    model, samples = task.model, _spread(task, training.num_samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training.num_steps))
    generator = torch.Generator().manual_seed(training.seed)
    points = [training.num_steps * (number + 1) // num_points for number in range(num_points)]
    exact: dict[int, list[tuple[float, float | None]]] = {point: [] for point in points}
    found = []
    with dptrain.attach(model, every=1) as meter:
        for step in range(training.num_steps):
            for point in points:
                if point - round(now_steps(point)) <= step < point:
                    whole = (point - 1 - step) % max(1, round(now_steps(point)) // NUM_EXACT) == 0
                    exact[point].append(_truth(task, samples, every_sample=whole))
            rows = torch.randint(len(samples), (training.batch,), generator=generator)
            for micro in rows.chunk(_NUM_SMALL):
                loss, _ = split_loss(task.loss(model, default_collate([samples[int(row)] for row in micro])))
                (loss / _NUM_SMALL).backward()  # type: ignore[no-untyped-call] # torch declares no types for it
            reading = meter.step()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step + 1 in points:
                scale = reading.noise_scale
                found.append(_point(step + 1, scale, exact.pop(step + 1)))
    return found


def _point(step: int, scale: NoiseScale, exact: Sequence[tuple[float, float | None]]) -> Point:
    traces = [trace for _, trace in exact if trace is not None]
    of_five = [grad for grad, trace in exact if trace is not None]
    trace = sum(traces) / len(traces)
    return Point(
        step=step,
        printed=scale,
        window=scale.window_mean,
        exact=trace / (sum(grad for grad, _ in exact) / len(exact)),
        exact_of_five=trace / (sum(of_five) / len(of_five)),
    )


def _truth(task: Task, samples: Subset[Any], *, every_sample: bool) -> tuple[float, float | None]:
    """Return |G|² of the whole set, and tr(Σ) where every sample is differentiated alone; else None.

    Draws with replacement know no covariance of D − 1: theirs is that of the set itself.
    """
    if every_sample:
        with _outside_the_meter(task.model):
            answer = exact_noise(task.model, task.loss, samples)
        return answer.grad_sq_norm, answer.noise_trace * (1 - 1 / len(samples))
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    total: Tensor | None = None
    with _outside_the_meter(task.model):
        for start in range(0, len(samples), _CHUNK):
            rows = [samples[row] for row in range(start, min(start + _CHUNK, len(samples)))]
            loss, _ = split_loss(task.loss(task.model, default_collate(rows)))
            gradients = torch.autograd.grad(loss, parameters)
            flat = torch.cat([g.flatten() for g in gradients]).double() * (len(rows) / len(samples))
            total = flat if total is None else total + flat
    assert total is not None
    return float(total @ total), None


class _outside_the_meter:  # noqa: N801 - a context
    """Evaluation mode, in which a meter takes no notice of a forward pass; the models have no dropout or batch norm."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.train()


def _spread(task: Task, num_samples: int) -> Subset[Any]:
    data = task.train_data
    total = len(data)  # type: ignore[arg-type] # torch's Dataset declares no length
    num = min(num_samples, total)
    return Subset(data, [row * total // num for row in range(num)])


def _rate(step: int, num_steps: int) -> float:
    warmup = max(1, round(_WARMUP_SHARE * num_steps))
    fallen = min(1.0, max(0, step - warmup) / (num_steps - warmup))
    cosine = _FINAL_FRACTION + (1 - _FINAL_FRACTION) * (1 + math.cos(math.pi * fallen)) / 2
    return min(1.0, (step + 1) / warmup) * cosine
