"""One quantity that drifts, seen through noise: filters of several memories, believed by how well each predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# The constants below were chosen on simulated courses of 800 and 1,000 steps (constant; ÷10 over the run and in its
# last quarter; a jump; tr(Σ) ×10 and ÷10; 1/t; a sine; random walks) with K = 2, 50 and 100 directions, B = φ and 2φ,
# and with K = 4, 200 directions, B = 4φ. `benchmarks.tracking` judges them on other lengths, settings and seeds.

MEMORIES = (math.inf, 1 / 3, 1 / 9, 1 / 27, 1 / 81)
"""Length of each filter's memory as a share of the run. The infinite one is a plain mean, for what does not drift."""

_PRIOR = (0.85, 0.08, 0.04, 0.02, 0.01)
"""Share of belief that each memory starts with, and that a change of regime hands out anew."""

_CHANGES = 0.2
"""Changes of regime that are expected while the run grows by a factor e. At 1, a constant course is read 1.3 times as
wide as its plain mean; at 0.1, a drift that begins late is found later."""

_SHORTEST = 10.0
"""Fewest steps of a memory: the present is defined as the mean over 20 steps at least."""

_BLIND = 30.0
"""A memory holds at least so many steps, in units of (noise of a step / level)²: one that could not tell the level to
about a fifth says nothing, and is never contradicted, so that it would widen every answer. At 10 the intervals after a
jump to B = φ/5 were up to 2.5 times as wide as the best window's, at 50 they held the truth in 90 %."""

_EVIDENCE = 0.5
"""Share of the run over which evidence for a memory is remembered."""

_SLOPE_NOISE = 0.25
"""Process noise of the slope in units of the noise of a step times memory⁻⁴: a steady state whose error is the noise of
a step over the memory (a local linear trend; Harvey 1989, chapter 4)."""

_PROCESS_SHARES = (1.0, 0.8, 0.8, 0.8, 1.0)
"""Part of each filter's variance that is reported. In the steady state 3/4 of a trend's is noise of measurement, which
is there on every course, and 1/4 is the wandering that the filter allows for. A smooth course has none of that, a
wandering one all: with a fifth of it the intervals of 95 % hold 95.7 % and 92.0 %. The fastest is for what wanders."""

_LONE = 5.0
"""Standard errors beyond which one value that stands alone is drawn in; two in a row pass as they are, for then it is
the course that jumped. A single spike of 260 would move a plain mean of 1,000 steps by eight of its standard errors."""

_FOLLOWS = 3.0

_LARGEST_EXCESS = 4.0
"""Cap on one squared residual of the present mean, so that the steps after a jump do not pass for wandering."""

_UNIFORM_EXCESS = 0.9205
"""E min(χ²₁, 4): the mean capped residual of a course that the filters follow."""

_EXCESS_SPREAD = 1.232
"""Var min(χ²₁, 4)."""

_CHANCE = 1.5
"""Standard errors within which an excess of the residuals passes for chance."""

NOW_SHARE, NOW_STEPS = 0.01, 20
"""The present: the mean over the last 1 % of the measured steps, and 20 at least. The |G|² of a single iterate swings
by a factor of two from one step to the next."""


class Memory(NamedTuple):
    """A filter of one memory: the level and slope it believes in.

    `var_level`, `cov` and `var_slope` are their error's covariance in units of the variance of a step's noise, so that
    the gain does not depend on how well that variance is known.
    """

    level: float
    slope: float
    var_level: float
    cov: float
    var_slope: float
    belief: float


class Drift(NamedTuple):
    """All that is remembered of one quantity.

    Attributes:
        memories: one filter for each of `MEMORIES`.
        recent: mean over about the present, exponentially weighted.
        excess: mean square of `recent` − what the filters say, capped, in units of what noise alone leaves of it.
        surprise: last value − its prediction, in standard errors.
        lone: share of steps whose value was drawn in.
    """

    memories: tuple[Memory, ...]
    recent: float = 0.0
    excess: float = _UNIFORM_EXCESS
    surprise: float = 0.0
    lone: float = 0.0


def begun(value: float) -> Drift:
    """Return the state after the first value."""
    return Drift(memories=tuple(Memory(value, 0.0, 1.0, 0.0, 0.0, share) for share in _PRIOR), recent=value)


def now_steps(step: int) -> float:
    """Return how many steps the present is, at measured step number `step`."""
    return max(float(NOW_STEPS), NOW_SHARE * step)


def level_of(memories: Sequence[Memory]) -> float:
    """Return the level at the last step, as all filters together see it."""
    return sum(memory.belief * memory.level for memory in memories)


def updated(drift: Drift, value: float, *, noise: float, rescale: float, step: int, weight: float) -> Drift:
    """Take in one value.

    Args:
        drift: after the steps before.
        value: unbiased for the level at this step.
        noise: variance of this value.
        rescale: `noise` over the noise of the last step, as far as batch and count of small batches differ.
        step: number of this step, from 2.
        weight: of the averages over the run, this step's being 1.
    """
    before = _believed(drift.memories, rescale=rescale, noise=noise, step=step)
    expected, spread = _mixed(before, noise=noise)
    deviation = math.sqrt(noise + spread)
    surprise = (value - expected) / deviation
    far = step > _SHORTEST and abs(surprise) > _LONE
    jumped = far and math.copysign(1.0, surprise) * drift.surprise > _FOLLOWS
    alone = far and not jumped
    if alone:
        value = expected + math.copysign(_LONE, surprise) * deviation
    memories = _corrected(before, value=value, noise=noise)
    num_now = now_steps(step)
    # What was before a jump is no part of the present.
    recent = level_of(memories) if jumped else drift.recent + max(2 / (num_now + 1), 1 / step) * (value - drift.recent)
    excess = drift.excess
    if step > NOW_STEPS:
        gap = recent - _centred(memories, step=step)
        excess += (min(gap * gap * num_now / noise, _LARGEST_EXCESS) - excess) / weight
    return Drift(memories, recent, excess, surprise, drift.lone + (alone - drift.lone) / step)


def _mixed(memories: Sequence[Memory], *, noise: float) -> tuple[float, float]:
    """Return mean and variance of the level over all filters."""
    # About one of them, so that a scatter in the ninth digit is not lost in the squares.
    middle = memories[0][0]
    mean = spread = 0.0
    for level_, _, var_level, _, _, belief in memories:
        offset = level_ - middle
        mean += belief * offset
        spread += belief * (var_level * noise + offset * offset)
    return middle + mean, max(spread - mean * mean, 0.0)


def _believed(memories: Sequence[Memory], *, rescale: float, noise: float, step: int) -> list[Memory]:
    """Return the filters' predictions of this step, with their beliefs before its value is seen."""
    mean, spread = _mixed(memories, noise=noise / rescale)
    above = max(mean, 0.0)
    shortest = max(_SHORTEST, min(_BLIND * noise / (above * above), step / 4) if above > 0 else step / 4)
    anew = min(0.3, _CHANGES / step)
    found = []
    for memory, share, prior, faded in zip(memories, MEMORIES, _PRIOR, _faded(memories, step=step), strict=True):
        belief = (1 - anew) * faded + anew * prior
        # A filter most of whose belief is handed in from the others takes over what they know: its own past is refuted.
        # Blending the states by their beliefs (the interacting multiple model) was tried: a thousandth of a belief in a
        # jump at each step, with its wide variance, read a constant course five times too wide.
        fresh = 2 * anew * prior > belief
        if fresh:
            state = (mean, 0.0, spread / noise, 0.0, 0.0)
        elif rescale == 1.0:
            state = memory[:5]
        else:
            level_, slope, var_level, cov, var_slope, _ = memory
            state = (level_, slope, var_level / rescale, cov / rescale, var_slope / rescale)
        if share < math.inf:
            # The second step is the first that is predicted.
            fresh = fresh or step == 2  # noqa: PLR2004
            state = _moved(*state, gain=1 / max(shortest, share * step), above=above, noise=noise, fresh=fresh)
        found.append(Memory(*state, belief))
    return found


def _faded(memories: Sequence[Memory], *, step: int) -> list[float]:
    """Return the beliefs with the evidence of long ago forgotten, towards the prior."""
    keep = 1 - 1 / max(20.0, _EVIDENCE * step)
    powers = [prior * (memory[5] / prior) ** keep for memory, prior in zip(memories, _PRIOR, strict=True)]
    total = sum(powers)
    return [power / total for power in powers]


def _moved(
    level_: float,
    slope: float,
    var_level: float,
    cov: float,
    var_slope: float,
    *,
    gain: float,
    above: float,
    noise: float,
    fresh: bool,
) -> tuple[float, float, float, float, float]:
    """Return a trend filter one step on: the level goes by the slope, and the slope grows or falls with the level."""
    # A change by its own size within the memory is what a filter expects before it has seen any slope.
    widest = (above * gain) ** 2 / noise
    var_slope = widest if fresh else min(var_slope + _SLOPE_NOISE * gain**4, max(widest, var_slope))
    factor = 1.0
    if level_ > 0 and level_ * level_ > var_level * noise:
        # The relative slope stays: |G|² falls by factors, not by amounts. The exact Jacobian of that was tried, and is
        # overconfident where the level is hardly known (coverage 77 % after a jump at B = φ/10).
        factor += min(max(slope / level_, -2 * gain), 2 * gain)
    return (
        level_ + slope,
        slope * factor,
        var_level + 2 * cov + var_slope,
        (cov + var_slope) * factor,
        var_slope * factor * factor,
    )


def _corrected(before: Sequence[Memory], *, value: float, noise: float) -> tuple[Memory, ...]:
    """Return the filters with the value taken in, and believed by how well they predicted it."""
    squares = [(value - memory[0]) ** 2 / ((memory[2] + 1) * noise) for memory in before]
    # Relative to the best of them, so that none of it underflows where all were surprised.
    best = min(squares)
    likely = [
        memory[5] * math.exp(-0.5 * min(square - best, 1e3)) / math.sqrt(memory[2] + 1)
        for memory, square in zip(before, squares, strict=True)
    ]
    total = sum(likely)
    found = []
    for (level_, slope, var_level, cov, var_slope, _), belief in zip(before, likely, strict=True):
        error = value - level_
        gain, slope_gain = var_level / (var_level + 1), cov / (var_level + 1)
        found.append(
            Memory(
                level_ + gain * error,
                slope + slope_gain * error,
                var_level * (1 - gain),
                cov * (1 - gain),
                var_slope - slope_gain * cov,
                max(belief / total, 1e-300),
            )
        )
    return tuple(found)


def _lag(step: int) -> float:
    """Return how many steps ago the middle of the present is."""
    return min((now_steps(step) - 1) / 2, step / 4)


def _centred(memories: Sequence[Memory], *, step: int) -> float:
    lag, found = _lag(step), 0.0
    for level_, slope, _, _, _, belief in memories:
        found += belief * (level_ - lag * slope)
    return found


def present(drift: Drift, *, noise: float, step: int, effective_steps: float) -> tuple[float, float]:
    """Return the mean over the present and the variance of its error.

    Args:
        drift: after the last step.
        noise: variance of one value at the last step.
        step: its number.
        effective_steps: for how many steps of equal weight the averages over the run stand.
    """
    lag = _lag(step)
    centred = []
    for memory, share in zip(drift.memories, _PROCESS_SHARES, strict=True):
        var = memory.var_level - 2 * lag * memory.cov + lag * lag * memory.var_slope
        # What lies a few steps back is better known than the end, but the value at the end bounds by how much.
        var = max(var, memory.var_level / 4) * share
        centred.append((memory.belief, memory.level - lag * memory.slope, var * noise))
    mean = sum(weight * level_ for weight, level_, _ in centred)
    # The mean of the standard deviations, not of the variances: a small belief in a wide filter moves the quantile at
    # 95 % less than the variance.
    deviation = sum(weight * math.sqrt(var + (level_ - mean) ** 2) for weight, level_, var in centred)
    window_noise = noise / now_steps(step)
    trust = _trust_in_recent(drift, step=step, effective_steps=effective_steps)
    return mean + trust * (drift.recent - mean), deviation * deviation + trust * window_noise


def _trust_in_recent(drift: Drift, *, step: int, effective_steps: float) -> float:
    """Return the weight of the plain present mean beside the filters, between 0 and 1.

    Between neighbours the truth wanders by what no filter follows. How much, the residuals of the present mean tell: in
    units of what noise alone leaves they average 1 + w, and the best weight is w/(1 + w). It is 0 where w is
    within 1.5 standard errors of none.
    """
    if step <= 2 * NOW_STEPS:
        return 0.0
    chance = _CHANCE * math.sqrt(_EXCESS_SPREAD * (now_steps(step) + 1) / 2 / effective_steps)
    if drift.excess <= _UNIFORM_EXCESS + chance:
        return 0.0
    return 1 - 1 / _uncapped(drift.excess)


def _uncapped(excess: float) -> float:
    """Return q with E min(q·χ²₁, 4) = `excess`."""
    from scipy.special import chdtr, chdtrc

    lower, upper = 1.0, 64.0
    for _ in range(24):
        middle = math.sqrt(lower * upper)
        cut = _LARGEST_EXCESS / middle
        found = middle * chdtr(3, cut) + _LARGEST_EXCESS * chdtrc(1, cut)
        lower, upper = (middle, upper) if found < excess else (lower, middle)
    return lower
