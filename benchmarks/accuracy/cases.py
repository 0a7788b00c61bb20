"""Known answers measured the user's way, by attach, step and read: one model in one wrapper and layout at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dptrain
from benchmarks.accuracy.problems import PROBLEMS, Mixture, Problem, digits_with_replacement, linear, quadratic
from benchmarks.accuracy.repetitions import LEVEL, Form, judged_row
from benchmarks.accuracy.wrappers import DDP, ONE_PROCESS, Wrapper, wrappers
from dptrain.noise import MomentSums, NoiseScale
from dptrain.observe import MeterState
from dptrain.tasks import KnownAnswer

_SECOND_MOMENT_STEP = 100
_SMALLEST_SECOND_MOMENT = 1e-3
_GOLDEN = (math.sqrt(5) - 1) / 2


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

    def sizes(self, *, micro_batch_size: int) -> list[list[int]]:
        """Return the samples of each micro-batch, by replica."""
        if self.shards is not None:
            return [[size] for size in self.shards]
        return [[micro_batch_size] * self.accumulation_steps] * self.world_size


LAYOUTS = (
    Layout(name="1×4", world_size=1, accumulation_steps=4),
    Layout(name="2×2", world_size=2, accumulation_steps=2),
    Layout(name="4×1", world_size=4),
    Layout(name="4/12/32", world_size=3, shards=(4, 12, 32)),
)
"""Each problem is measured in each of them, in one process or in DDP."""

MIXED = (quadratic, linear, digits_with_replacement)
"""Measured together, as parts of one model, in each wrapper."""
MIXED_MICRO_BATCH_SIZE = 32
MIXED_NUM_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured at once.

    Attributes:
        wrapper: how the replicas are put together.
        layout: and what each of them does.
        problems: parts of one model.
        micro_batch_size: in samples.
        num_steps: of a repetition.
        seed: of the samples.
    """

    wrapper: Wrapper
    layout: Layout
    problems: Sequence[Problem]
    micro_batch_size: int
    num_steps: int
    seed: int

    @property
    def counts_negative(self) -> bool:
        """Whether single steps are looked at, which is to wait for each."""
        return any(problem.name == "clamping" for problem in self.problems)


def measure_cases(rank: int, world_size: int, form: Form) -> list[dict[str, Any]]:
    """Measure all cases for this many replicas, in turn, as one of them; rank 0 returns the rows."""
    rows = []
    for case in _cases(world_size, compiler=form.compiler):
        rows += measured(case, rank=rank, form=form)
        torch.compiler.reset()
    return rows if rank == 0 else []


def measured(case: Case, *, rank: int, form: Form) -> list[dict[str, Any]]:
    """Measure one case as one of its replicas; return a row for each problem and meter."""
    return _Measurement(case, rank=rank, form=form).run()


def _cases(world_size: int, *, compiler: str | None) -> list[Case]:
    problems = [make_problem() for make_problem in PROBLEMS]
    cases = [
        Case(
            wrapper=DDP if world_size > 1 else ONE_PROCESS,
            layout=layout,
            problems=[problem],
            micro_batch_size=problem.micro_batch_size,
            num_steps=problem.num_steps,
            seed=1000 * number + 100 * world_size,
        )
        for layout in LAYOUTS
        for number, problem in enumerate(problems)
        if layout.world_size == world_size
    ]
    mixed = [problem for problem, make_problem in zip(problems, PROBLEMS, strict=True) if make_problem in MIXED]
    return cases + [
        Case(
            wrapper=wrapper,
            layout=Layout(
                name=f"{world_size}×{wrapper.accumulation_steps}",
                world_size=world_size,
                accumulation_steps=wrapper.accumulation_steps,
            ),
            problems=mixed,
            micro_batch_size=MIXED_MICRO_BATCH_SIZE,
            num_steps=MIXED_NUM_STEPS,
            seed=1000 * number + 7,
        )
        for number, wrapper in enumerate(wrappers(compiler=compiler))
        if wrapper.world_size == world_size and wrapper not in (DDP, ONE_PROCESS)
    ]


class _Measurement:
    """One case: a model of many copies, the meters on it, and what they said at the end of each repetition."""

    def __init__(self, case: Case, *, rank: int, form: Form) -> None:
        self._case, self._form = case, form
        self._generator = torch.Generator().manual_seed(case.seed)
        sizes = case.layout.sizes(micro_batch_size=case.micro_batch_size)
        self._sizes = sizes[rank]
        self._num_samples = sum(map(sum, sizes))
        self._begin = sum(map(sum, sizes[:rank]))
        mixture = Mixture(case.problems, num_copies=form.num_copies)
        # By the modules: wrapping may replace parameters, and put a module between a part and the whole.
        models = {
            (problem.name, number): own
            for problem, copies in zip(case.problems, mixture.copies(), strict=True)
            for number, own in enumerate(copies)
        }
        self._loop = case.wrapper.wrap(mixture)
        self._groups = {f"{problem} {number}": (problem, own) for (problem, number), own in models.items()}
        self._nothing = dict.fromkeys(self._groups, MomentSums())
        self._num_negative = 0

    def run(self) -> list[dict[str, Any]]:
        """Return a row for each problem and meter."""
        options: dict[str, Any] = {"every": 1, "level": LEVEL, "population": self._case.problems[0].population}
        truths = {problem.name: problem.truth for problem in self._case.problems}
        if self._case.wrapper.geometry == "adam":
            models = [own for _, own in self._groups.values()]
            options |= {"geometry": "adam", "optimizer": _adam(self._loop.model, models=models)}
            truths = {problem.name: _preconditioned(problem) for problem in self._case.problems}
        groups = {name: list(own.parameters()) for name, (_, own) in self._groups.items()}
        with contextlib.ExitStack() as stack:
            meters = [
                stack.enter_context(dptrain.attach(self._loop.model, method=method, groups=groups, **options))
                for method in self._case.wrapper.methods
            ]
            # In the first round beside one that knows of no groups; DDP's hook has room for one meter only.
            with dptrain.attach(self._loop.model, **options) as whole:
                found = [self._one_round(meters, others=[whole])]
                difference = _difference(found[0][0].groups, whole.read_window())
            found += [self._one_round(meters) for _ in range(1, self._form.rounds)]
            rows = [
                self._row(problem, meter=meter, truth=truth, readings=readings)
                for meter, readings in zip(meters, zip(*found, strict=True), strict=True)
                for problem, truth in truths.items()
            ]
        return [row | {"ungrouped_difference": difference} for row in rows]

    def _one_round(self, meters: Sequence[dptrain.Meter], *, others: Sequence[dptrain.Meter] = ()) -> list[_Reading]:
        """Run one repetition in all copies and return what the meters say at its end; the others are there too."""
        for meter in meters:
            meter.restore(MeterState(sums=MomentSums(), steps_measured=0, steps_dropped=0, groups=self._nothing))
        for _ in range(self._case.num_steps // self._form.shortening):
            self._step([*meters, *others])
        assert all(meter.steps_dropped == 0 for meter in meters)
        return [_Reading.of(meter) for meter in meters]

    def _step(self, meters: list[dptrain.Meter]) -> None:
        """Accumulate this replica's micro-batches and close the step."""
        case = self._case
        # All replicas draw the same global batches and take their own part, so that none can overlap by mistake.
        shape = (self._form.num_copies, self._num_samples)
        drawn = [problem.draw(self._generator, shape).transpose(0, 1) for problem in case.problems]
        begin = self._begin
        for number, size in enumerate(self._sizes, start=1):
            share = size * case.layout.world_size / self._num_samples
            if case.layout.shards is not None:
                for meter in meters:
                    meter.begin(num_samples=size, weight=share)
            samples = tuple(one[begin : begin + size] for one in drawn)
            self._loop.accumulate(samples, share=share, last=number == len(self._sizes))
            begin += size
        for meter in meters:
            meter.step()
        if case.counts_negative:
            self._num_negative += sum(sums.last_grad < 0 for sums in meters[0].state().groups.values())
        self._loop.model.zero_grad()

    def _row(
        self, problem: str, *, meter: dptrain.Meter, truth: KnownAnswer, readings: Sequence[_Reading]
    ) -> dict[str, Any]:
        names = [name for name, (owner, _) in self._groups.items() if owner == problem]
        row = judged_row(
            problem=problem,
            wrapper=self._case.wrapper.name,
            layout=self._case.layout.name,
            observer=meter.method,
            truth=truth,
            scales=[reading.groups[name] for reading in readings for name in names],
        )
        row["groups_sum_error"] = max(reading.sum_error for reading in readings)
        if self._case.counts_negative and meter.method != "hook":
            row["negative"] = self._num_negative / (row["num_repetitions"] * row["num_steps"])
        return row


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What a meter said at the end of one round.

    Attributes:
        groups: one repetition each.
        sum_error: how far they are from adding up to the whole, relative to it.
    """

    groups: dict[str, NoiseScale]
    sum_error: float

    @classmethod
    def of(cls, meter: dptrain.Meter) -> _Reading:
        groups = meter.read_groups()
        return cls(groups=groups, sum_error=_difference(groups, meter.read_window()))


def _difference(parts: dict[str, NoiseScale], whole: NoiseScale) -> float:
    trace = sum(part.noise_trace for part in parts.values())
    grad = sum(part.grad_sq_norm for part in parts.values())
    return max(abs(trace / whole.noise_trace - 1), abs(grad / whole.grad_sq_norm - 1))


def _second_moments(num: int) -> Tensor:
    """Return what Adam might hold of `num` elements, spread over three decades without a pattern."""
    return _SMALLEST_SECOND_MOMENT ** (torch.arange(num, dtype=torch.float64) * _GOLDEN % 1)


def _adam(model: nn.Module, *, models: list[nn.Module]) -> torch.optim.Adam:
    """Return an optimizer that holds `_second_moments` of each copy, as it would after many steps."""
    optimizer = torch.optim.Adam(model.parameters())
    for own in models:
        parameters = list(own.parameters())
        counts = [p.numel() for p in parameters]
        moments = torch.split(_second_moments(sum(counts)).float(), counts)
        for p, moment in zip(parameters, moments, strict=True):
            optimizer.state[p] = {
                "step": torch.tensor(float(_SECOND_MOMENT_STEP)),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": moment.view_as(p),
            }
    return optimizer


def _preconditioned(problem: Problem) -> KnownAnswer:
    """Return the truth in the geometry of P = 1/(√v̂ + ε), with Adam's default β₂ and ε."""
    assert problem.elements is not None
    elements = problem.elements()
    corrected = _second_moments(len(elements.mean)) / (1 - 0.999**_SECOND_MOMENT_STEP)
    return elements.answer(scale=1 / (corrected.sqrt() + 1e-8))
