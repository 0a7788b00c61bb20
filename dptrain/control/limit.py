"""Wrappers round any controller that hold what it asks for to what is wise and to what the hardware runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, TypeVar

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
    shrink_band: float | None = None
    """The same for a batch that is to shrink; None: `dead_band`."""
    grow_only_samples: int = 0
    """Samples from the start in which the batch does not shrink."""
    dwell_samples: int = 0
    """Samples that must pass after the start or a change before the next one."""
    dwell_decisions: int = 0
    """Measured decisions that must pass after the start or a change before the next one."""
    probe_steps: int = 0
    """Measured steps for which the double is tried, at least, where the batch has stayed for four times as many; 0: it
    is not tried."""


def limited(law: Controller, *, quantum: int, limits: Limits) -> Controller:
    """Wrap `law` in all of `limits`, in the order in which they may overrule each other.

    Law → dead band → probe → growth alone → dwell → rounding → largest change → bounds: the further out, the harder.
    So the result is always a rung of the ladder within the bounds, and what is wise yields to what runs. From a batch
    on the ladder and within the bounds, every limit holds at once; from one that is not (a run resumed on other
    hardware), the outer ones go first. On a measurement that stays the same the batch turns back from a probe alone.

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
    if limits.dead_band is not None or limits.shrink_band is not None:
        controller = DeadBand(
            controller,
            grow=limits.dead_band,
            shrink=limits.dead_band if limits.shrink_band is None else limits.shrink_band,
        )
    if limits.probe_steps:
        controller = Probe(controller, steps=limits.probe_steps, largest=largest)
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
    """Ignores changes smaller than a ratio of batches: each costs a new shape and a restart of the prefetch.

    A batch that is too small lowers the noise scale that is measured (McCandlish et al. 2018, appendix C), and so
    confirms itself, where one that is too large does not. So a way down may have to be longer than a way up.

    Attributes:
        grow: ratio from which on the batch grows, above 1; None: always.
        shrink: ratio from which on it shrinks, above 1; None: always.
    """

    _: KW_ONLY
    grow: float | None
    shrink: float | None

    def __post_init__(self) -> None:
        for name, ratio in (("dead_band", self.grow), ("shrink_band", self.shrink)):
            if ratio is not None and not 1 < ratio < math.inf:
                raise ConfigError(f"{name} must be a ratio of batches above 1, such as 1.5, got {ratio}")

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:
        """Return the present batch where the one asked for is too near to it."""
        wanted, present = asked.global_batch_size, measurement.global_batch_size
        ratio = self.grow if wanted > present else self.shrink
        if ratio is None or max(wanted / present, present / wanted) >= ratio:
            return asked
        return _changed(asked, present, why=f"a change below a factor of {ratio:g} is ignored")


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


Remembering = TypeVar("Remembering", bound="DwellState | ProbeState")


def _restored(kind: type[Remembering], record: Mapping[str, Any], *, inner: Controller, memory: str) -> Remembering:
    """Return the saved state of a limit that remembers something of its own round that of `inner`."""
    names = {field.name for field in fields(kind)}
    if set(record) != names:
        raise CheckpointError(
            f"the saved controller does not remember {memory} ({', '.join(sorted(names ^ set(record)))}): "
            "resume with the controller settings of the saved run"
        )
    return kind(**{**record, "inner": inner.restore(record["inner"])})


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
        return _restored(DwellState, record, inner=self.inner, memory="its dwell time")

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


_SHARE_OF_THE_RUN = 1 / 6
"""Of the steps before a probe: as long as it lasts, after which the memory is mostly of the double."""
_PAUSE = 4
"""Lengths of a probe for which a batch stays before the first one."""
_LONGER = 3
"""Factor on the pause after a probe in vain: where all are, they take a tenth to a fifth of a long run."""


@dataclass(frozen=True, kw_only=True)
class ProbeState(State):
    """What `Probe` remembers.

    Attributes:
        inner: state of the controller inside.
        pause: measured steps at one batch before the next probe.
        global_batch_size: batch in force at the last decision; None before the first.
        since: measured steps of the run at the first decision with that batch.
        origin: batch whose double was asked for, while it is in force or not granted yet; else None.
    """

    inner: State
    pause: int
    global_batch_size: int | None = None
    since: int = 0
    origin: int | None = None


@dataclass(frozen=True)
class Probe:
    """Tries the double where a batch has stayed for long, and keeps it if the controller is content there, too.

    The noise scale that is measured grows with the batch, for a part of |G|² is what the last steps have shaken up
    (McCandlish et al. 2018, appendix C). So more than one batch can be right by its own measurement, and a run that
    comes from below stays at the lowest. A probe is held for as long as the memory of the noise scale needs to be
    mostly of the double; then the controller decides. Where it turns back, then or later, the next pause is three times
    as long, so that probes in vain grow ever more seldom. Tried in docs/decisions/0023-a-probe-of-the-double.md.

    Attributes:
        inner: the controller that decides whether to stay.
        steps: measured steps that a probe lasts, at least; the first one begins after four times as many at one batch.
        largest: batch that no probe goes beyond.
    """

    inner: Controller
    _: KW_ONLY
    steps: int
    largest: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"probe_steps must be at least 1, or 0 for no probes, got {self.steps}")

    def init(self) -> ProbeState:
        """Return the state before the first decision."""
        return ProbeState(inner=self.inner.init(), pause=_PAUSE * self.steps)

    def restore(self, record: Mapping[str, Any]) -> ProbeState:
        """Return the saved state."""
        return _restored(ProbeState, record, inner=self.inner, memory="its probes")

    def update(self, state: State, measurement: Measurement) -> tuple[ProbeState, Decision]:
        """Ask the controller inside; where it has long been content, ask for the double, and hold that for a while."""
        assert isinstance(state, ProbeState), f"Probe was given a {type(state).__name__}"
        present, measured = measurement.global_batch_size, measurement.noise_scale.num_steps
        inner, asked = self.inner.update(state.inner, measurement)
        since = state.since if present == state.global_batch_size else measured
        steps = measured - since
        origin = state.origin if state.origin is not None and present == 2 * state.origin else None
        after = replace(state, inner=inner, global_batch_size=present, since=since, origin=origin)
        if origin is not None:
            if asked.global_batch_size <= present and steps < max(self.steps, round(_SHARE_OF_THE_RUN * since)):
                return after, _changed(asked, present, why=f"step {steps} of a probe of the double of {origin}")
            if asked.global_batch_size < present:
                return replace(after, pause=_LONGER * state.pause, origin=None), asked
        if asked.global_batch_size != present or steps < state.pause or 2 * present > self.largest:
            return after, asked
        why = f"{steps} steps at {present}, so a probe of the double"
        return replace(after, origin=present), _changed(asked, 2 * present, why=why)
