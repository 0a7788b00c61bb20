"""The base learning rate against position: built-in courses, the staircase of a Seesaw run, a user's own function.

Each is a closed form of the position in samples, so a run that resumes has the same rate as one that did not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dptrain.errors import ConfigError

DECAY_FRACTION = 0.2
"""Share of the run over which a wsd schedule decays, where none is given."""
_MOST_HALVINGS = 40
"""A rate of 0 would have been halved without end."""


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """The base rate against position: a linear warm-up, then constant, a half cosine, a straight line, or late decay.

    A closed form of the position in samples, so that it does not depend on how the samples were cut into steps.
    """

    kind: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Course after the warm-up. wsd: constant, and a straight line at the end (Hu et al. 2024, arXiv 2404.06395)."""
    warmup_samples: int = 0
    """Samples over which the rate rises from 0 to its full height."""
    max_samples: int | None = None
    """Position at which the fall ends, in samples; needed for all but constant."""
    final_fraction: float = 0.0
    """Share of the full height that is left at `max_samples` and after."""
    decay_fraction: float | None = None
    """Share of `max_samples` over which a wsd schedule falls. Default: 0.2 (Hägele et al. 2024, arXiv 2405.18392)."""

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine", "linear", "wsd"):
            raise ConfigError(f"learning rate schedule must be constant, cosine, linear or wsd, got {self.kind!r}")
        if self.warmup_samples < 0:
            raise ConfigError(f"warmup_samples must not be negative, got {self.warmup_samples}")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction must lie between 0 and 1, got {self.final_fraction}")
        if self.kind == "constant":
            if self.final_fraction != 0:
                raise ConfigError("final_fraction has no meaning for a constant learning rate: remove it")
        elif self.max_samples is None or self.max_samples <= self.warmup_samples:
            raise ConfigError(
                f"a {self.kind} learning rate needs max_samples above warmup_samples {self.warmup_samples}, "
                f"got {self.max_samples}"
            )
        self._check_decay()

    def _check_decay(self) -> None:
        if self.kind != "wsd":
            if self.decay_fraction is not None:
                raise ConfigError(f"decay_fraction has no meaning for a {self.kind} learning rate: remove it")
        elif not 0 < self._decay_fraction <= 1 or self._decay_start < self.warmup_samples:
            raise ConfigError(
                f"a wsd learning rate decays over the last decay_fraction {self._decay_fraction} of max_samples "
                f"{self.max_samples}, which must be in (0, 1] and begin after warmup_samples {self.warmup_samples}"
            )

    @property
    def _decay_fraction(self) -> float:
        return DECAY_FRACTION if self.decay_fraction is None else self.decay_fraction

    @property
    def _decay_start(self) -> float:
        """Where the fall begins, in samples."""
        assert self.max_samples is not None, "a constant rate does not fall"
        if self.kind == "wsd":
            return (1 - self._decay_fraction) * self.max_samples
        return self.warmup_samples

    def factor(self, samples_seen: float) -> float:
        """Return the factor on the base rate, between 0 and 1.

        Args:
            samples_seen: position at the *end* of the step, which is above 0 in the first: with the position at
                its beginning a warm-up would spend its first step on a rate of 0.
        """
        if samples_seen < self.warmup_samples:
            return samples_seen / self.warmup_samples
        if self.kind == "constant" or self.max_samples is None:
            return 1.0
        start = self._decay_start
        done = min(max(samples_seen - start, 0.0) / (self.max_samples - start), 1.0)
        left = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.final_fraction + (1 - self.final_fraction) * left


@dataclass(frozen=True, kw_only=True)
class StaircaseSchedule:
    """A falling schedule as a staircase of halvings: 1, ½, ¼, … from where the schedule itself is down to each.

    The warm-up is the schedule's. The staircase is the base rate of a Seesaw run, and the rate rule multiplies it by
    its factor for the batch as usual: with `square_root` the rate falls by √2 at each doubling of the batch (Adam),
    with `linear` it stays (SGD; Smith et al. 2018, arXiv 1711.00489). Where the batch cannot be doubled any more, or
    not yet, the rate falls by the whole half: nothing acts twice, and nothing is lost.

    Attributes:
        schedule: that would halve the rate.
    """

    schedule: LearningRateSchedule

    def __post_init__(self) -> None:
        if self.schedule.kind == "constant":
            raise ConfigError(
                "Seesaw doubles the batch where a schedule halves the learning rate: choose one that falls"
            )

    def halvings(self, samples_seen: float) -> int:
        """Return how often the schedule has halved the rate since its height, by this position."""
        if samples_seen < self.schedule.warmup_samples:
            return 0
        share = self.schedule.factor(samples_seen)
        # The added part in 1e9 is rounding: a schedule that is down to the half there is down to it.
        return min(math.floor(-math.log2(share) + 1e-9), _MOST_HALVINGS) if share > 0 else _MOST_HALVINGS

    def factor(self, samples_seen: float) -> float:
        """Return the factor on the base rate, in place of `LearningRateSchedule.factor`."""
        warming_up = samples_seen < self.schedule.warmup_samples
        return self.schedule.factor(samples_seen) if warming_up else 0.5 ** self.halvings(samples_seen)


@dataclass(frozen=True, kw_only=True)
class FunctionSchedule:
    """A user's function as a schedule.

    Attributes:
        function: (samples seen, samples of the run) → factor on the base rate.
        max_samples: samples of the run.
        name: as the user wrote it.
    """

    function: Callable[[int, int], float]
    max_samples: int
    name: str

    def factor(self, samples_seen: int) -> float:
        """Return the factor for the step that ends at a position.

        Raises:
            ConfigError: where the function gives no number of at least 0.
        """
        value = self.function(samples_seen, self.max_samples)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ConfigError(f"{self.name} must return a number of at least 0, got {value!r} at {samples_seen}")
        return float(value)
