"""Does the meter recover known answers?"""
# python -m benchmarks.accuracy [--json PATH|-] [--quick]

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from benchmarks import harness
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.replicas import run_replicas
from dptrain.noise import MomentSums, NoiseScale, Resolution, unbiased_moments
from dptrain.observe import DdpTap, Meter, MeterState, ParameterTap
from dptrain.observe.tap import Tap

LANES = 20
"""Repetitions that run side by side: one backward pass carries that many models, each with meters of its own."""
LEVEL = 0.95
LARGEST_RELATIVE_ERROR = 0.02
SMALLEST_COVERAGE, LARGEST_COVERAGE = 0.92, 0.98

GradBucket = Any  # torch.distributed.GradBucket, which torch leaves without a type

_FRESH = MeterState(sums=MomentSums(), steps_measured=0, steps_dropped=0)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a global batch is laid out.

    Attributes:
        name: replicas × accumulation, or the shards in samples.
        world_size: replicas.
        accumulation_steps: micro-batches of each replica.
        shards: samples of each replica's one micro-batch, where they are uneven.
    """

    name: str
    world_size: int
    accumulation_steps: int = 1
    shards: tuple[int, ...] | None = None

    def sizes(self, problem: Problem) -> list[list[int]]:
        """Return the samples of each micro-batch, by replica."""
        if self.shards is not None:
            return [[size] for size in self.shards]
        return [[problem.micro_batch_size] * self.accumulation_steps] * self.world_size


LAYOUTS = (
    Layout(name="1×4", world_size=1, accumulation_steps=4),
    Layout(name="2×2", world_size=2, accumulation_steps=2),
    Layout(name="4×1", world_size=4),
    Layout(name="4/12/32", world_size=3, shards=(4, 12, 32)),
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How much is measured.

    Attributes:
        rounds: of LANES repetitions each.
        shortening: by which the number of steps of a repetition is divided.
    """

    rounds: int
    shortening: int = 1

    @property
    def num_repetitions(self) -> int:
        """Repetitions of each case."""
        return self.rounds * LANES


FULL = Form(rounds=30)
QUICK = Form(rounds=1, shortening=2)


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """What one observer knew at the end of one repetition, and how many of its steps had a negative |G|²."""

    scale: NoiseScale
    num_negative: int


class SharedReduction:
    """A communication hook that reduces the gradients of all lanes at once, for `DdpTap(inner=…)`.

    One small all-reduce costs many times the rest of such a step. DDP waits for its hook's future when the backward
    pass ends, and one backward pass runs through all lanes: by then the last of them has started the reduction.
    """

    def __init__(self, *, world_size: int) -> None:
        self._world_size = world_size
        self._waiting: list[tuple[Tensor, Future[Tensor]]] = []

    def __call__(self, _state: object, bucket: GradBucket) -> Future[Tensor]:
        """Hold a lane's gradient back until all are there."""
        assert bucket.is_last(), "a lane's model fits into one bucket"
        future: Future[Tensor] = Future()
        self._waiting.append((bucket.buffer(), future))
        if len(self._waiting) == LANES:
            self._reduce()
        return future

    def _reduce(self) -> None:
        waiting, self._waiting = self._waiting, []
        total = torch.cat([gradient for gradient, _ in waiting]) / self._world_size
        dist.all_reduce(total)
        for mean, (_, future) in zip(total.chunk(len(waiting)), waiting, strict=True):
            # DDP reads the result from the beginning of its storage, so each needs one of its own.
            future.set_result(mean.clone())


class Lane:
    """One copy of the model, in DDP where there are several replicas, watched by every observer that works there."""

    def __init__(self, problem: Problem, *, world_size: int, reduction: SharedReduction) -> None:
        self.model: nn.Module = copy.deepcopy(problem.model)
        taps: list[Tap] = [ParameterTap(self.model.parameters())]
        if world_size > 1:
            self.model = DistributedDataParallel(self.model)
            taps.append(DdpTap(self.model, inner=reduction))
        self.meters = [
            Meter(self.model.parameters(), tap=tap, level=LEVEL, population=problem.population) for tap in taps
        ]

    def forward(self, samples: Tensor, *, weight: float) -> Tensor:
        """Announce a micro-batch and return its weighted mean loss."""
        for meter in self.meters:
            meter.begin(num_samples=len(samples), weight=weight)
        loss: Tensor = self.model(samples).mean() * weight
        return loss

    def waits(self) -> contextlib.AbstractContextManager[None]:
        """Hold back the all-reduce: for all micro-batches but the last."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else contextlib.nullcontext()


def measure(quick: bool) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Measure every case, one launch of processes per layout."""
    form = QUICK if quick else FULL
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for layout in LAYOUTS:
        with console.status(f"{layout.name}: {len(PROBLEMS)} problems, {form.num_repetitions} repetitions each"):
            rows += run_replicas(measure_layout, world_size=layout.world_size, args=(layout, form))
    names = list(dict.fromkeys(row["problem"] for row in rows))
    rows.sort(key=lambda row: names.index(row["problem"]))
    figures = {
        "max_relative_error": max(max(row["trace_error"], row["grad_error"]) for row in rows),
        "min_coverage": min(row["coverage"] for row in rows),
        "max_coverage": max(row["coverage"] for row in rows),
        "num_cases": len(rows),
    }
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=_note(figures, form=form))


_COLUMNS = {
    "problem": "{problem}",
    "layout": "{layout}",
    "observer": "{observer}",
    "true tr(Σ), |G|²": "{true_trace:.4g}, {true_grad:.4g}",
    "mean": "{mean_trace:.4g}, {mean_grad:.4g}",
    "relative error": "{trace_error:.2%}, {grad_error:.2%}",
    "by chance": "{trace_chance:.2%}, {grad_chance:.2%}",
    "true φ": "{true_scale:.4g}",
    "φ": "{scale:.4g}",
    "coverage": "{coverage:.1%}",
    "|G|² < 0": "{negative:.0%}",
}


def _note(figures: dict[str, float], *, form: Form) -> str:
    if form is QUICK:
        return f"{form.num_repetitions} short repetitions: too few for the bounds that the full form is held to"
    held = (
        figures["max_relative_error"] <= LARGEST_RELATIVE_ERROR
        and figures["min_coverage"] >= SMALLEST_COVERAGE
        and figures["max_coverage"] <= LARGEST_COVERAGE
    )
    return (
        f"{form.num_repetitions} repetitions; bounds {'held' if held else 'BROKEN'}: errors up to "
        f"{LARGEST_RELATIVE_ERROR:.0%}, coverage {SMALLEST_COVERAGE:.0%}–{LARGEST_COVERAGE:.0%}"
    )


def measure_layout(rank: int, world_size: int, layout: Layout, form: Form) -> list[dict[str, Any]]:
    """Measure all problems in one layout, in turn, as one of its replicas; rank 0 returns the rows."""
    rows = []
    for number, make_problem in enumerate(PROBLEMS):
        problem = make_problem()
        problem = replace(problem, num_steps=problem.num_steps // form.shortening)
        # All replicas draw the same global batches and take their own part, so none can overlap by mistake.
        generator = torch.Generator().manual_seed(1000 * number + 100 * layout.world_size)
        reduction = SharedReduction(world_size=world_size)
        lanes = [Lane(problem, world_size=world_size, reduction=reduction) for _ in range(LANES)]
        repetitions: list[list[Repetition]] = [[] for _ in lanes[0].meters]
        for _ in range(form.rounds):
            sums = _one_round(lanes, problem=problem, sizes=layout.sizes(problem), rank=rank, generator=generator)
            if rank > 0:
                continue  # every replica has the same sums; one of them suffices to read them
            for lane, lane_sums in zip(lanes, sums, strict=True):
                for meter, steps, found in zip(lane.meters, lane_sums, repetitions, strict=True):
                    found.append(_read(meter, steps, population=problem.population))
        if rank == 0:
            rows += [
                _row(problem, layout=layout, meter=meter, repetitions=found)
                for meter, found in zip(lanes[0].meters, repetitions, strict=True)
            ]
    return rows


def _one_round(
    lanes: list[Lane], *, problem: Problem, sizes: list[list[int]], rank: int, generator: torch.Generator
) -> list[list[list[list[float]]]]:
    """Run one repetition in every lane and return what the meters saw, summed over the replicas.

    By lane, meter and step. The sums of all steps travel together: a collective costs more than these steps.
    """
    global_batch_size = sum(map(sum, sizes))
    start = sum(map(sum, sizes[:rank]))
    samples = problem.draw(generator, (problem.num_steps, len(lanes), global_batch_size))
    own = samples[:, :, start : start + sum(sizes[rank])]
    seen = torch.stack(
        [
            _one_step(lanes, own[step], sizes=sizes[rank], share=len(sizes) / global_batch_size)
            for step in range(len(own))
        ]
    )
    dist.all_reduce(seen)
    by_lane: list[list[list[list[float]]]] = seen.permute(1, 2, 0, 3).tolist()
    return by_lane


def _one_step(lanes: list[Lane], samples: Tensor, *, sizes: list[int], share: float) -> Tensor:
    """Accumulate one replica's micro-batches and return the meters' sums, shape (lanes, meters, sums).

    Args:
        lanes: all of them.
        samples: this replica's, shape (lanes, samples, …).
        sizes: of its micro-batches.
        share: weight per sample of a micro-batch's mean loss, world_size/global_batch_size.
    """
    for number, micro_batch in enumerate(torch.split(samples, sizes, dim=1)):
        with contextlib.ExitStack() as stack:
            if number < len(sizes) - 1:
                for lane in lanes:
                    stack.enter_context(lane.waits())
            weight = sizes[number] * share
            losses = [lane.forward(own, weight=weight) for lane, own in zip(lanes, micro_batch, strict=True)]
            torch.autograd.backward(losses)
    sums = torch.stack([torch.stack([meter.local_sums() for meter in lane.meters]) for lane in lanes])
    for lane in lanes:
        lane.model.zero_grad()
    return sums


def _read(meter: Meter, steps: list[list[float]], *, population: int | None) -> Repetition:
    """Hand one repetition to a meter that knows nothing yet and read it at the end."""
    meter.restore(_FRESH)
    moments = [unbiased_moments(norms, population=population) for norms in map(meter.absorb, steps) if norms]
    assert meter.steps_dropped == 0
    return Repetition(
        scale=meter.read(), num_negative=sum(found.grad_sq_norm < 0 for found in moments if found is not None)
    )


def _row(problem: Problem, *, layout: Layout, meter: Meter, repetitions: list[Repetition]) -> dict[str, Any]:
    scales = [repetition.scale for repetition in repetitions]
    truth, phi = problem.truth, problem.truth.simple_noise_scale
    trace = _Mean.of([scale.noise_trace for scale in scales], truth=truth.noise_trace)
    grad = _Mean.of([scale.grad_sq_norm for scale in scales], truth=truth.grad_sq_norm)
    num_steps = len(scales) * problem.num_steps
    return {
        "problem": problem.name,
        "layout": layout.name,
        "observer": meter.seam,
        "num_repetitions": len(scales),
        "num_steps": problem.num_steps,
        "true_trace": truth.noise_trace,
        "mean_trace": trace.mean,
        "trace_error": trace.relative_error,
        "trace_chance": trace.standard_error,
        "true_grad": truth.grad_sq_norm,
        "mean_grad": grad.mean,
        "grad_error": grad.relative_error,
        "grad_chance": grad.standard_error,
        "true_scale": phi,
        "scale": trace.mean / grad.mean,
        "coverage": statistics.fmean(scale.lower <= phi <= scale.upper for scale in scales),
        "resolved": statistics.fmean(scale.state is Resolution.RESOLVED for scale in scales),
        "negative": sum(repetition.num_negative for repetition in repetitions) / num_steps,
        # The scatter of one step as the meters estimate it: the variance of the mean, undone.
        "step_var_trace": statistics.fmean(scale.var_trace * scale.effective_steps for scale in scales),
        "step_var_grad": statistics.fmean(scale.var_grad * scale.effective_steps for scale in scales),
        "step_cov": statistics.fmean(scale.cov * scale.effective_steps for scale in scales),
    }


@dataclass(frozen=True, kw_only=True)
class _Mean:
    """The mean of one half of the pair over all repetitions, relative to the truth; chance leaves `standard_error`."""

    mean: float
    relative_error: float
    standard_error: float

    @classmethod
    def of(cls, values: list[float], *, truth: float) -> _Mean:
        mean = statistics.fmean(values)
        return cls(
            mean=mean,
            relative_error=abs(mean / truth - 1),
            standard_error=statistics.stdev(values) / math.sqrt(len(values)) / truth,
        )


if __name__ == "__main__":
    harness.run(measure, question=__doc__, name="accuracy")
