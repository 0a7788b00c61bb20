"""Samples that are used again: by how much |G|², read within an epoch, is too large; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

from dptrain.errors import ConfigError

_EPOCHS = 5.0
"""Epochs over which the profile is averaged: long enough for some 80 steps where an epoch has 16, and no longer,
because the bias grows from epoch to epoch."""

_FEWEST_STEPS = 24.0
"""Steps of equal weight below which three coefficients say nothing."""

_KNOWN_BY = 4.0
"""Standard errors that |G|² at the start of an epoch must be above zero: a ratio to less than that is anything."""

_UNKNOWN_BEYOND = 0.1
"""Standard error of the bias beyond which it counts as unknown."""


@dataclass(frozen=True, kw_only=True)
class ReuseState:
    """Faded sums over steps for a quadratic of |G|², in units of its window mean, by the position in the epoch.

    Attributes:
        position: samples drawn since the start of the run.
        p0, p1, p2, p3, p4: Σω·uᵏ, u being the part of the epoch that was drawn before a step.
        g0, g1, g2: Σω·uᵏ·ratio.
        squares: Σω·ratio².
    """

    position: float = 0.0
    p0: float = 0.0
    p1: float = 0.0
    p2: float = 0.0
    p3: float = 0.0
    p4: float = 0.0
    g0: float = 0.0
    g1: float = 0.0
    g2: float = 0.0
    squares: float = 0.0

    def to_json(self) -> dict[str, float]:
        """Return the record as a flat mapping."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, float]) -> ReuseState:
        """Rebuild the record.

        Raises:
            ConfigError: where a name is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if names != set(record):
            raise ConfigError(f"not a state of re-used samples: names differ by {sorted(names ^ set(record))}")
        return cls(**{name: float(value) for name, value in record.items()})


@dataclass(frozen=True, kw_only=True)
class ReuseBias:
    """By how much |G|² is read too large at present.

    Attributes:
        relative: bias as a share of the exact |G|² of the whole data set: 0.38 for a third too much.
        error: its standard error.
    """

    relative: float
    error: float

    @property
    def matters(self) -> bool:
        """Whether it is distinguishable from zero and above a twentieth."""
        return self.relative > max(2 * self.error, 0.05)


def reuse_warning(state: ReuseState, *, present_samples: float, population: int) -> str | None:
    """Return a warning where samples were used again and |G|² reads too large, or may; None where it does not.

    Args:
        state: after the last step.
        present_samples: samples over which the present is averaged.
        population: samples in the data set.
    """
    if state.position <= population:
        return None
    bias = reuse_bias(state, present_samples=present_samples, population=population)
    if bias is not None and bias.matters:
        return (
            f"samples are used again: |G|² reads {bias.relative:.0%} (±{bias.error:.0%}) too large, and the noise "
            "scale too small accordingly"
        )
    if bias is None or bias.error > _UNKNOWN_BEYOND:
        return "samples are used again: |G|² may read too large, by how much is not known yet"
    return None


def skipped(state: ReuseState, *, num_samples: float) -> ReuseState:
    """Count samples of a step that was not measured."""
    return replace(state, position=state.position + num_samples)


def reuse_updated(
    state: ReuseState, *, grad_sq_norm: float, window_mean: float, num_samples: float, population: int
) -> ReuseState:
    """Take in one step.

    The first epoch is only counted: nothing is used again there, and the first gradients fall by orders of magnitude.

    Args:
        state: before the step.
        grad_sq_norm: the step's |G|², corrected for draws without replacement.
        window_mean: mean |G|² over the window, which spans epochs.
        num_samples: of the step.
        population: samples in the data set; steps draw from it in epochs without replacement.
    """
    position = state.position + num_samples
    ratio = grad_sq_norm / window_mean if window_mean > 0 else math.nan
    if state.position < population or not math.isfinite(ratio):
        return skipped(state, num_samples=num_samples)
    u = state.position % population / population
    keep = math.exp(-num_samples / population / _EPOCHS)
    return ReuseState(
        position=position,
        p0=keep * state.p0 + 1,
        p1=keep * state.p1 + u,
        p2=keep * state.p2 + u**2,
        p3=keep * state.p3 + u**3,
        p4=keep * state.p4 + u**4,
        g0=keep * state.g0 + ratio,
        g1=keep * state.g1 + u * ratio,
        g2=keep * state.g2 + u**2 * ratio,
        squares=keep * state.squares + ratio**2,
    )


def reuse_bias(state: ReuseState, *, present_samples: float, population: int) -> ReuseBias | None:
    """Return the bias of |G|² at present; None where it is not known.

    At the start of an epoch nothing of the epoch was trained on, and |G|² is right. At its end only samples are left
    that the parameters were not fitted to since the last epoch, and their gradient is larger than the whole set's. The
    parameters do not jump at the boundary, so |G|² late in an epoch over |G|² at its start is the bias.

    Args:
        state: after the last step.
        present_samples: samples over which the present is averaged.
        population: samples in the data set.
    """
    if state.p0 < _FEWEST_STEPS:
        return None
    import numpy as np

    normal = np.array([[state.p0, state.p1, state.p2], [state.p1, state.p2, state.p3], [state.p2, state.p3, state.p4]])
    if np.linalg.cond(normal) > 1e8:  # noqa: PLR2004 - an epoch of one or two steps has no profile
        return None
    sums = np.array([state.g0, state.g1, state.g2])
    inverse = np.linalg.inv(normal)
    fit = inverse @ sums
    noise = max(state.squares - float(fit @ sums), 0.0) / state.p0
    share = min(present_samples / population, 1.0)
    end = state.position % population / population
    row = np.array(_mean_powers(end - share, end))
    start = np.array([1.0, 0.0, 0.0])
    at_start = float(start @ fit)
    # The fading counts about two steps as one in the noise: Σω² is half of Σω.
    start_error = math.sqrt(float(inverse[0, 0]) * noise / 2)
    if at_start < _KNOWN_BY * start_error:
        return None
    ratio = float(row @ fit) / at_start
    slope = (row - ratio * start) / at_start
    error = math.sqrt(max(float(slope @ inverse @ slope) * noise, 0.0) / 2)
    return ReuseBias(relative=ratio - 1, error=error)


def _mean_powers(start: float, end: float) -> list[float]:
    """Return the means of 1, u and u² over positions from `start` to `end`; those below 0 are an epoch earlier."""
    pieces = [(max(start, 0.0), end), (start + 1, 1.0)] if start < 0 else [(start, end)]
    total = sum(high - low for low, high in pieces)
    if total <= 0:
        return [1.0, end, end**2]
    return [sum((high**k - low**k) / k for low, high in pieces) / total for k in (1, 2, 3)]
