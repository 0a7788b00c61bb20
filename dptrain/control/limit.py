"""Wrappers round any controller that hold what it asks for to what is wise and to what the hardware runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

from dptrain.control.base import Controller, Decision, Measurement, State
from dptrain.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a batch may do, for `limited`. None: not limited in this way."""

    largest: int
    """Largest global batch, in samples."""
    smallest: int | None = None
    """Smallest global batch, in samples; None for the least that the replicas run."""
    powers_of_two: bool = True
    """Only batches of quantum × 2^k, so that a compiled model meets a handful of shapes; else all multiples."""
    max_change: float | None = 2.0
    """Largest factor by which one decision changes the batch, at least 2; where it is too large by more than the square
    of that, it shrinks by half of the way, in log space."""
    dead_band: float | None = None
    """Ratio of batches, above 1, below which a change is not worth making."""
    grow_only_samples: int = 0
    """Samples from the start in which the batch does not shrink."""
    dwell_samples: int = 0
    """Samples that must pass after the start or a change before the next one."""
    dwell_decisions: int = 0
    """Measured decisions that must pass after the start or a change before the next one."""


def limited(law: Controller, *, quantum: int, limits: Limits) -> Controller:
    """Wrap `law` in all of `limits`, in the order in which they may overrule each other.

    Law → dead band → growth alone → dwell → rounding → largest change → bounds: the further out, the harder.
    So the result is always a rung of the ladder within the bounds, and what is wise yields to what runs. From a batch
    on the ladder and within the bounds, every limit holds at once; from one that is not (a run resumed on other
    hardware), the outer ones go first. On a measurement that stays the same the batch never turns back.

    Args:
        law: what to limit.
        quantum: samples that the batch must be a multiple of: smallest micro-batch × world size.
        limits: the settings.

    Raises:
        ConfigError: where a setting is out of range, or no rung lies within the bounds.
    """
    ladder = Ladder(quantum=quantum, powers_of_two=limits.powers_of_two)
    smallest = ladder.above(quantum if limits.smallest is None else limits.smallest)
    largest = ladder.below(limits.largest)
    if not smallest <= largest <= limits.largest:
        raise ConfigError(
            f"no batch between smallest {limits.smallest or quantum} and largest {limits.largest} can run: the "
            f"batches that can are {ladder}; largest must be at least {smallest}"
        )
    controller = law
    if limits.dead_band is not None:
        controller = DeadBand(controller, ratio=limits.dead_band)
    if limits.grow_only_samples:
        controller = GrowOnly(controller, samples=limits.grow_only_samples)
    if limits.dwell_samples or limits.dwell_decisions:
        controller = DwellTime(controller, samples=limits.dwell_samples, decisions=limits.dwell_decisions)
    controller = Rounding(controller, ladder=ladder)
    if limits.max_change is not None:
        controller = MaxChange(controller, factor=limits.max_change, ladder=ladder)
    return Bounds(controller, smallest=smallest, largest=largest)


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """The batches that the hardware runs, its rungs.

    Attributes:
        quantum: the lowest rung, in samples: smallest micro-batch × world size.
        powers_of_two: rungs are quantum × 2^k; else quantum × k.
    """

    quantum: int
    powers_of_two: bool = True

    def __post_init__(self) -> None:
        if self.quantum < 1:
            raise ConfigError(f"quantum (micro-batch × world size) must be at least 1 sample, got {self.quantum}")

    def below(self, batch: float) -> int:
        """Return the highest rung that is not above `batch`; the lowest rung where there is none."""
        count = max(int(batch // self.quantum), 1)
        return self.quantum * (1 << (count.bit_length() - 1) if self.powers_of_two else count)

    def above(self, batch: float) -> int:
        """Return the lowest rung that is not below `batch`."""
        rung = self.below(batch)
        return rung if rung >= batch else self._next(rung)

    def nearest(self, batch: float) -> int:
        """Return the rung at the smallest ratio to `batch`."""
        lower = self.below(batch)
        upper = self._next(lower)
        return lower if (batch / lower) ** 2 <= upper / lower else upper

    def _next(self, rung: int) -> int:
        return 2 * rung if self.powers_of_two else rung + self.quantum

    def __str__(self) -> str:
        quantum = self.quantum
        return ", ".join(str(quantum * factor) for factor in (1, 2, 4 if self.powers_of_two else 3)) + ", …"


@dataclass(frozen=True)
class _Limit(ABC):
    """A wrapper that remembers nothing of its own: its state is that of the controller inside.

    Attributes:
        inner: the controller whose decisions are limited.
    """

    inner: Controller

    def init(self) -> State:
        """Return the state of the controller inside, before the first decision."""
        return self.inner.init()

    def restore(self, record: Mapping[str, Any]) -> State:
        """Return the state of the controller inside, as saved."""
        return self.inner.restore(record)

    def update(self, state: State, measurement: Measurement) -> tuple[State, Decision]:
        """Ask the controller inside, and limit its answer."""
        state, asked = self.inner.update(state, measurement)
        return state, self.limit(asked, measurement)

    @abstractmethod
    def limit(self, asked: Decision, measurement: Measurement) -> Decision:
        """Return the decision that stands, given the batch in force and the position of the run."""


def _changed(asked: Decision, batch: float, *, why: str) -> Decision:
    """Return `asked` with another batch and the reason for it added; itself where the batch is the same."""
    if batch == asked.global_batch_size:
        return replace(asked, global_batch_size=batch)  # a rung is whole where the law's number may be a float
    return Decision(global_batch_size=batch, reason=f"{asked.reason}; {why}: {batch:.4g}")


@dataclass(frozen=True)
class Bounds(_Limit):
    """Keeps the batch between two bounds.

    Attributes:
        smallest: lower bound, in samples.
        largest: upper bound, in samples.
    """

    _: KW_ONLY
    smallest: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.largest:
            raise ConfigError(f"need 1 ≤ smallest ≤ largest, got smallest {self.smallest}, largest {self.largest}")

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:  # noqa: ARG002 - bounds always hold
        """Return the batch within the bounds that is nearest to the one asked for."""
        batch = min(max(asked.global_batch_size, self.smallest), self.largest)
        return _changed(asked, batch, why="smallest batch" if batch == self.smallest else "largest batch")


@dataclass(frozen=True)
class Rounding(_Limit):
    """Rounds to the nearest rung in log space: half and double of a batch are equally far from it.

    Attributes:
        ladder: the batches that run.
    """

    _: KW_ONLY
    ladder: Ladder

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:  # noqa: ARG002 - rungs are always the same
        """Return the rung nearest to the batch asked for."""
        return _changed(asked, self.ladder.nearest(asked.global_batch_size), why="nearest that runs")


@dataclass(frozen=True)
class DeadBand(_Limit):
    """Ignores changes smaller than a ratio: each change costs a new shape and a restart of the prefetch.

    Attributes:
        ratio: of the larger to the smaller batch, above 1.
    """

    _: KW_ONLY
    ratio: float

    def __post_init__(self) -> None:
        if not 1 < self.ratio < math.inf:
            raise ConfigError(f"dead_band must be a ratio of batches above 1, such as 1.5, got {self.ratio}")

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:
        """Return the present batch where the one asked for is too near to it."""
        wanted, present = asked.global_batch_size, measurement.global_batch_size
        if max(wanted / present, present / wanted) >= self.ratio:
            return asked
        return _changed(asked, present, why=f"a change below a factor of {self.ratio:g} is ignored")


@dataclass(frozen=True)
class GrowOnly(_Limit):
    """Lets the batch grow and not shrink in the first part of a run, for the warm-up of the learning rate.

    The noise scale of a model that hardly moves yet is small, and it rises as soon as the model moves. A warm-up is
    counted in samples: small batches make it longer, in steps and in seconds.

    Attributes:
        samples: length of that part.
    """

    _: KW_ONLY
    samples: int

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ConfigError(f"grow_only_samples must not be negative, got {self.samples}")

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:
        """Return the present batch where a smaller one is asked for too early."""
        present = measurement.global_batch_size
        if measurement.samples_seen >= self.samples or not asked.global_batch_size < present:
            return asked
        return _changed(asked, present, why=f"it does not shrink in the first {self.samples:,} samples")


@dataclass(frozen=True)
class MaxChange(_Limit):
    """Holds the change of one decision to a factor, and where the batch is far too large to half of the way.

    Each step at a batch that is far too large costs as many times more, while one that has become too small costs
    little, and is soon put right. Half of the way, in log space, leaves a measurement of two steps room to err.

    Attributes:
        factor: largest ratio of the batches before and after, at least 2: no less leads from rung to rung.
        ladder: where given, the step ends on the last rung within the factor.
    """

    _: KW_ONLY
    factor: float = 2.0
    ladder: Ladder | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.factor < math.inf:  # noqa: PLR2004 - a ladder's first two rungs differ by 2
            raise ConfigError(f"max_change must be a factor of at least 2, got {self.factor}")

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:
        """Return the batch nearest to the one asked for that lies within the factor."""
        present = measurement.global_batch_size
        lowest, highest = present / self.factor, present * self.factor
        why = f"at most a factor of {self.factor:g} at once"
        if (half_way := math.sqrt(present * asked.global_batch_size)) < lowest:
            lowest, why = half_way, "at most half of the way down at once"
        if self.ladder is not None:
            lowest, highest = self.ladder.above(lowest), self.ladder.below(highest)
        batch = min(max(asked.global_batch_size, lowest), highest)
        return _changed(asked, batch, why=why)


_NEAR = 2.0
"""Ratio of batches up to which a change waits for all of its decisions."""
_FEWEST_TO_SHRINK = 2
"""Decisions from which on there is an interval at all."""
_LEAST_TO_GROW = 1 / 3
"""Share of the decisions that even the largest growth waits for: steps at a batch that is too small are cheap."""


@dataclass(frozen=True, kw_only=True)
class DwellState(State):
    """What `DwellTime` remembers; None before the first decision or the first change.

    Attributes:
        inner: state of the controller inside.
        global_batch_size: batch in force at the last decision.
        samples_seen: position of the last decision.
        changed_at: position of the last change.
        decisions: measured decisions since the last change.
    """

    inner: State
    global_batch_size: int | None = None
    samples_seen: int | None = None
    changed_at: int | None = None
    decisions: int = 0


@dataclass(frozen=True)
class DwellTime:
    """Leaves a batch in force for a while after each change, so that it is measured before it is judged.

    The start counts as a change: the first few steps say little. A change is one that happened: seen from the batch
    of the next measurement, whoever made it. A batch that is wrong by more than two needs less of a measurement: the
    decisions that are waited for fall as that factor rises, to a third for growth, and further where the batch is too
    large, for there each step is as much dearer.

    Attributes:
        inner: the controller whose decisions are held back.
        samples: that must have passed since the last change.
        decisions: that must have been measured since the last change.
    """

    inner: Controller
    _: KW_ONLY
    samples: int = 0
    decisions: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0 or self.decisions < 0:
            raise ConfigError(f"dwell must not be negative, got {self.samples} samples, {self.decisions} decisions")

    def init(self) -> DwellState:
        """Return the state before the first decision."""
        return DwellState(inner=self.inner.init())

    def restore(self, record: Mapping[str, Any]) -> DwellState:
        """Return the saved state."""
        names = {field.name for field in fields(DwellState)}
        if set(record) != names:
            raise CheckpointError(
                f"the saved controller does not remember its dwell time ({', '.join(sorted(names ^ set(record)))}): "
                "resume with the controller settings of the saved run"
            )
        return DwellState(**{**record, "inner": self.inner.restore(record["inner"])})

    def update(self, state: State, measurement: Measurement) -> tuple[DwellState, Decision]:
        """Ask the controller inside, and keep the present batch while it is too new."""
        assert isinstance(state, DwellState), f"DwellTime was given a {type(state).__name__}"
        present = measurement.global_batch_size
        inner, asked = self.inner.update(state.inner, measurement)
        just_changed = state.global_batch_size not in (None, present)
        after = replace(
            state,
            inner=inner,
            global_batch_size=present,
            samples_seen=measurement.samples_seen,
            changed_at=state.samples_seen if just_changed else state.changed_at,
            decisions=1 if just_changed else state.decisions + 1,
        )
        passed = measurement.samples_seen - (after.changed_at or 0)
        if passed >= self.samples and after.decisions >= self._enough(asked.global_batch_size / present):
            return after, asked
        since = "the start" if after.changed_at is None else "the last change"
        why = f"only {passed} samples and {after.decisions} decisions since {since}"
        return after, _changed(asked, present, why=why)

    def _enough(self, ratio: float) -> int:
        """Return how many decisions a change by `ratio` waits for."""
        share = min(_NEAR * min(ratio, 1 / ratio), 1.0)
        if ratio > 1:
            return math.ceil(max(share, _LEAST_TO_GROW) * self.decisions)
        return max(math.ceil(share * self.decisions), min(_FEWEST_TO_SHRINK, self.decisions))
