"""Wrappers round any controller that hold what it asks for to what is wise and to what the hardware runs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from dptrain.control.base import Controller, Decision, Measurement, State
from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchSizeGrid:
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
        grid_point = self.below(batch)
        return grid_point if grid_point >= batch else self._next(grid_point)

    def nearest(self, batch: float) -> int:
        """Return the rung at the smallest ratio to `batch`."""
        lower = self.below(batch)
        upper = self._next(lower)
        return lower if (batch / lower) ** 2 <= upper / lower else upper

    def _next(self, grid_point: int) -> int:
        return 2 * grid_point if self.powers_of_two else grid_point + self.quantum

    def __str__(self) -> str:
        quantum = self.quantum
        return ", ".join(str(quantum * factor) for factor in (1, 2, 4 if self.powers_of_two else 3)) + ", …"


@dataclass(frozen=True)
class Limit(ABC):
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


def changed(asked: Decision, batch: float, *, why: str) -> Decision:
    """Return `asked` with another batch and the reason for it added; itself where the batch is the same."""
    if batch == asked.global_batch_size:
        return replace(asked, global_batch_size=batch)  # a rung is whole where the law's number may be a float
    return Decision(global_batch_size=batch, reason=f"{asked.reason}; {why}: {batch:.4g}")


@dataclass(frozen=True)
class Bounds(Limit):
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
        return changed(asked, batch, why="smallest batch" if batch == self.smallest else "largest batch")


@dataclass(frozen=True)
class Rounding(Limit):
    """Rounds to the nearest rung in log space: half and double of a batch are equally far from it.

    Attributes:
        ladder: the batches that run.
    """

    _: KW_ONLY
    grid: BatchSizeGrid

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:  # noqa: ARG002 - rungs are always the same
        """Return the rung nearest to the batch asked for."""
        return changed(asked, self.grid.nearest(asked.global_batch_size), why="nearest that runs")


def _check_ratio(ratio: float, *, name: str) -> None:
    if not 1 < ratio < math.inf:
        raise ConfigError(f"{name} must be a ratio of batches above 1, such as 1.5, got {ratio}")


@dataclass(frozen=True)
class DeadBand(Limit):
    """Ignores changes smaller than a ratio: each change costs a new shape and a restart of the prefetch.

    Attributes:
        ratio: of the larger to the smaller batch, above 1.
    """

    _: KW_ONLY
    ratio: float

    def __post_init__(self) -> None:
        _check_ratio(self.ratio, name="dead_band")

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:
        """Return the present batch where the one asked for is too near to it."""
        wanted, present = asked.global_batch_size, measurement.global_batch_size
        if max(wanted / present, present / wanted) >= self.ratio:
            return asked
        return changed(asked, present, why=f"a change below a factor of {self.ratio:g} is ignored")


@dataclass(frozen=True)
class ShrinkBand(Limit):
    """Keeps a batch that is too large by less than a ratio.

    A batch that is too small lowers the noise scale that is measured (McCandlish et al. 2018, appendix C), and so
    confirms itself, where one that is too large does not. So the way down is longer than the way up. Tried in
    docs/decisions/0024-a-longer-way-down.md.

    Attributes:
        ratio: of the batch in force to the one asked for, from which on it shrinks; above 1.
    """

    _: KW_ONLY
    ratio: float

    def __post_init__(self) -> None:
        _check_ratio(self.ratio, name="shrink_band")

    def limit(self, asked: Decision, measurement: Measurement) -> Decision:
        """Return the present batch where the one asked for is smaller, by less than the ratio."""
        wanted, present = asked.global_batch_size, measurement.global_batch_size
        if not wanted < present < self.ratio * wanted:
            return asked
        return changed(asked, present, why=f"too large by less than {self.ratio:g}, it stays")


@dataclass(frozen=True)
class GrowOnly(Limit):
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
        return changed(asked, present, why=f"it does not shrink in the first {self.samples:,} samples")


@dataclass(frozen=True)
class MaxChange(Limit):
    """Holds the change of one decision to a factor, and where the batch is far too large to half of the way.

    Each step at a batch that is far too large costs as many times more, while one that has become too small costs
    little, and is soon put right. Half of the way, in log space, leaves a measurement of two steps room to err.

    Attributes:
        factor: largest ratio of the batches before and after, at least 2: no less leads from rung to rung.
        ladder: where given, the step ends on the last rung within the factor.
    """

    _: KW_ONLY
    factor: float = 2.0
    grid: BatchSizeGrid | None = None

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
        if self.grid is not None:
            lowest, highest = self.grid.above(lowest), self.grid.below(highest)
        batch = min(max(asked.global_batch_size, lowest), highest)
        return changed(asked, batch, why=why)
