"""Limits that remember: how long a batch stays in force before it is judged, and when the next one is tried."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, TypeVar

from dptrain.control.base import Controller, Decision, Measurement, State
from dptrain.control.limit import changed
from dptrain.errors import CheckpointError, ConfigError

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
        return after, changed(asked, present, why=why)

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
    mostly of the double; then the controller decides. Where it asks for less, then or later, the next pause is three
    times as long, so that probes in vain grow ever more seldom. Tried in docs/decisions/0023-a-probe-of-the-double.md.

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
                return after, changed(asked, present, why=f"step {steps} of a probe of the double of {origin}")
            if asked.global_batch_size < present:
                return replace(after, pause=_LONGER * state.pause, origin=None), asked
        if asked.global_batch_size != present or steps < state.pause or 2 * present > self.largest:
            return after, asked
        why = f"{steps} steps at {present}, so a probe of the double"
        return replace(after, origin=present), changed(asked, 2 * present, why=why)
