"""One quantity that drifts, seen through noise: filters of several memories, believed by how well each predicts."""

# ruff: noqa: FURB136 - within a step, a call of min or max costs as much as nine multiplications, and there were fifty

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dptrain.errors import ConfigError

# The constants below were chosen on simulated courses of 800 and 1,000 steps (constant; ÷10 over the run and in its
# last quarter; a jump; tr(Σ) ×10; K = 2, 100 directions, φ = B/2, and K = 4, 200 directions, φ = B/4) and on six real
# trainings of 1,000 to 1,500 steps with the exact |G|² and tr(Σ) beside them: autoencoders by AdamW and by SGD,
# classifiers by both, an LSTM. `benchmarks.tracking` judges them on other lengths, settings and seeds.

SHARES = (math.inf, 1.0, 1 / 3, 1 / 9, 1 / 27)
"""Share of the run within which each filter expects a change of the level by its own size. The first expects none: a
plain mean."""

_PRIOR = (0.35, 0.15, 0.35, 0.1, 0.05)
"""Share of belief that each filter tends to where the steps do not distinguish them. |G|² of the real trainings changed
by a factor e within a third of the run: with 0.85 for the plain mean, an autoencoder's was read 1.4 to 1.7 times too
large where the noise of a step is three times the level."""

_FEWEST_TRENDS = 0.1
"""Least part of the trends' prior belief. A run no longer than the present has no trend that the present leaves out."""

_CHANGES = 0.2
"""Changes of regime that are expected while the run grows by a factor e. At 1, a constant course is read 1.3 times as
wide as its plain mean; at 0.1, a drift that begins late is found later."""

_MOST_CHANGES = 0.3
"""Most of a belief that is handed in at a step."""

_SHORTEST = 10.0
"""Fewest steps within which a filter expects a change of the level by its own size: half of the present."""

_EVIDENCE = 0.5
"""Share of the run over which evidence for a memory is remembered."""

_PROCESS_SHARES = (1.0, 0.7, 0.9, 1.0, 1.0)
"""Part of each filter's variance that is reported. In the steady state 3/4 of a trend's is noise of measurement, which
is there on every course, and 1/4 is the wandering that the filter allows for. A course that a slow trend follows has
none of that; one that needs a fast trend has all. With 0.8 for the three in the middle the intervals of 95 % held 98 %
of a steady fall and 92 % of a late one."""

_LONE = 5.0
"""Standard errors beyond which one value that stands alone is drawn in; two in a row pass as they are, for then it is
the course that jumped. A single spike of 260 would move a plain mean of 1,000 steps by eight of its standard errors."""

_FOLLOWS = 3.0

FLICKERS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
"""How much the mean over the present may stray from the smooth course, in units of the level: standard deviations, of
which the steps tell the right one. |G|² of the real trainings strays by 0.13 to 0.17, at SGD by up to 0.5."""

GRAD_FLICKER = (0.4, 0.1, 0.2, 0.25, 0.04, 0.01)
"""Prior belief in each of `FLICKERS` for |G|²."""

TRACE_FLICKER = (0.5, 0.3, 0.1, 0.06, 0.03, 0.01)
"""The same for tr(Σ), which strays by 0.01 to 0.05, at SGD by up to 0.15."""

_FLICKER_LEFT = 0.6
"""Part of the flicker's variance that the residuals of the present mean hold; the rest the filters have followed."""

_FLICKER_WINDOWS = 2.0
"""Flicker is correlated over so many presents: the real trainings' grows until 40 to 60 steps."""

_FLICKER_EVERY = 5
"""Steps between two looks at the residual of the present mean, which is much the same from one step to the next. At
each step they would cost a quarter of all that taking in a step costs."""

_TAILS = 6.0
"""Degrees of freedom of Student's t for the residuals of the present mean, so that a jump does not pass for flicker."""

NOW_SHARE, NOW_STEPS = 0.01, 20
"""The present: the mean over the last 1 % of the measured steps, and 20 at least. The |G|² of a single iterate swings
by a factor of two from one step to the next."""

_LARGEST_EXCESS, _SMALLEST_BELIEF = 1e3, 1e-300
"""Bounds that keep every belief above zero: what is not believed at all never comes back."""

_OVERLAP = 1 - (1 - 2 / (NOW_STEPS + 1)) ** NOW_STEPS
"""Weight that the exponential mean over about the present has within the present."""


Memory = tuple[float, float, float, float, float, float]
"""A filter of one memory: level, slope, variance of the level, covariance, variance of the slope, share of belief.

The covariance of the error is in units of the variance of a step's noise, so that the gain does not depend on how well
that variance is known. A plain tuple, because ten are made and fifty unpacked at each step: a named one takes eight
times as long to make and four times as long to unpack.
"""


class Drift(NamedTuple):
    """All that is remembered of one quantity.

    Attributes:
        memories: one filter for each of `SHARES`.
        flicker: belief in each of `FLICKERS`.
        recent: mean over about the present, exponentially weighted.
        surprise: last value − its prediction, in standard errors; 0 where that is too little for a jump to follow.
        lone: share of steps whose value was drawn in.
    """

    memories: tuple[Memory, ...]
    flicker: tuple[float, ...]
    recent: float = 0.0
    surprise: float = 0.0
    lone: float = 0.0

    def to_json(self) -> list[list[float]]:
        """Return the numbers in their order, for names would take a tenth of the record."""
        (level, _, var_level, _, _, belief), *trends = self.memories
        # The plain mean has no slope.
        mean = [level, var_level, belief]
        return [mean, *map(list, trends), list(self.flicker), [self.recent, self.surprise, self.lone]]

    @classmethod
    def from_json(cls, record: Sequence[Sequence[float]] | Mapping[str, Any]) -> Drift:
        """Rebuild the record, or one of before, which had names and the slope of the plain mean, 0.

        Raises:
            ConfigError: where it has other parts or lengths.
        """
        if isinstance(record, Mapping) and set(record) == set(cls._fields):
            (level, _, var_level, _, _, belief), *trends = record["memories"]
            rest = [record[name] for name in ("recent", "surprise", "lone")]
            record = [[level, var_level, belief], *trends, record["flicker"], rest]
        if isinstance(record, Mapping) or [len(part) for part in record] != _LENGTHS:
            found = sorted(record) if isinstance(record, Mapping) else record
            raise ConfigError(f"not the state of a drifting quantity: {found}")
        parts: list[Any] = [tuple(map(float, part)) for part in record]
        (level, var_level, belief), *trends, flicker, rest = parts
        return cls(((level, 0.0, var_level, 0.0, 0.0, belief), *trends), flicker, *rest)


_LENGTHS = [3, *[6] * (len(SHARES) - 1), len(FLICKERS), 3]
"""Numbers in each part of the record of a `Drift`."""


class _Schedule(NamedTuple):
    """What follows from the number of a step alone, and so is the same for tr(Σ), |G|² and a reading.

    Attributes:
        priors: share of belief that each filter tends to.
        kept: share of a belief that stays where it is; the rest is handed in by the priors, in case the regime changed.
        handed_in: belief that each filter is given so.
        evidence: power to which a belief, over its prior, is faded.
        reaches: steps within which each filter expects a change of the level by its own size; None for the plain mean.
        first: whether it is the first step that is predicted.
        num_now: steps that the present is.
        newest: weight of a value in the mean over about the present.
        lag: how many steps ago the middle of the present is.
        outside: how far what lies before the present may stray from it: not at all in the first two presents.
        flicker_steps: steps over which flicker is correlated, times `outside`.
    """

    priors: tuple[float, ...]
    kept: float
    handed_in: tuple[float, ...]
    evidence: float
    reaches: tuple[float | None, ...]
    first: bool
    num_now: float
    newest: float
    lag: float
    outside: float
    flicker_steps: float


@functools.lru_cache(maxsize=4)
def _schedule(step: int) -> _Schedule:
    trends = max(_FEWEST_TRENDS, 1 - NOW_STEPS / step)
    priors = (1 - trends * (1 - _PRIOR[0]), *[trends * share for share in _PRIOR[1:]])
    anew = _CHANGES / step if _CHANGES / step < _MOST_CHANGES else _MOST_CHANGES
    reaches = [share * step for share in SHARES[1:]]
    num_now = now_steps(step)
    outside = max(0.0, 1 - 2 * NOW_STEPS / step)
    return _Schedule(
        priors=priors,
        kept=1 - anew,
        handed_in=tuple([anew * prior for prior in priors]),
        evidence=1 - 1 / max(20.0, _EVIDENCE * step),
        reaches=(None, *[reach if reach > _SHORTEST else _SHORTEST for reach in reaches]),
        first=step == 2,  # noqa: PLR2004 - the second step is the first that is predicted
        num_now=num_now,
        newest=max(2 / (num_now + 1), 1 / step),
        lag=min((num_now - 1) / 2, step / 4),
        outside=outside,
        flicker_steps=outside * NOW_STEPS * _FLICKER_WINDOWS,
    )


def begun(value: float, *, flicker: tuple[float, ...]) -> Drift:
    """Return the state after the first value, with the prior belief in each of `FLICKERS`."""
    priors = _schedule(1).priors
    return Drift(tuple((value, 0.0, 1.0, 0.0, 0.0, share) for share in priors), flicker, recent=value)


def now_steps(step: int) -> float:
    """Return how many steps the present is, at measured step number `step`."""
    return max(float(NOW_STEPS), NOW_SHARE * step)


def level_of(memories: Sequence[Memory]) -> float:
    """Return the level at the last step, as all filters together see it."""
    found = 0.0
    for level, _, _, _, _, belief in memories:
        found += belief * level
    return found


def updated(
    drift: Drift, value: float, *, level: float, noise: float, rescale: float, step: int, flicker: tuple[float, ...]
) -> Drift:
    """Take in one value.

    Args:
        drift: after the steps before.
        value: unbiased for the level at this step.
        level: `level_of` the drift's memories, which who calls this needs as well.
        noise: variance of this value.
        rescale: `noise` over the noise of the last step, as far as batch and count of small batches differ.
        step: number of this step, from 2.
        flicker: prior belief in each of `FLICKERS`.
    """
    at = _schedule(step)
    more = _noise_of_flicker(level, drift.flicker, at)
    slow_noise = noise + more
    before = _predicted(drift.memories, at, rescale=slow_noise / (noise / rescale + more), noise=slow_noise)
    expected, spread = _mixed(before, noise=slow_noise)
    deviation = math.sqrt(noise + spread)
    surprise = (value - expected) / deviation
    far = step > _SHORTEST and abs(surprise) > _LONE
    jumped = far and math.copysign(1.0, surprise) * drift.surprise > _FOLLOWS
    alone = far and not jumped
    if alone:
        value = expected + math.copysign(_LONE, surprise) * deviation
    memories = _corrected(before, value=value, noise=slow_noise)
    # What was before a jump is no part of the present.
    recent = level_of(memories) if jumped else drift.recent + at.newest * (value - drift.recent)
    found = drift.flicker
    if step > NOW_STEPS and step % _FLICKER_EVERY == 0:
        gap, above = recent - _centred(memories, lag=at.lag), max(level_of(memories), 0.0)
        found = _flicker(found, flicker, gap=gap, level=above, noise=noise / at.num_now, step=step)
    follows = surprise if abs(surprise) > _FOLLOWS else 0.0
    return Drift(memories, found, recent, follows, drift.lone + (alone - drift.lone) / step)


def _noise_of_flicker(level: float, flicker: tuple[float, ...], at: _Schedule) -> float:
    """Return the variance that flicker adds to a step's noise for a filter with a memory beyond its correlation.

    A mean over m presents has the variance of one over m, times the presents over which flicker is correlated.
    """
    level = max(level, 0.0)
    return at.flicker_steps * _mean_square(flicker) * level * level


@functools.lru_cache(maxsize=8)
def _mean_square(flicker: tuple[float, ...]) -> float:
    """Return the mean square of the flicker, in units of the level's; the beliefs change at every fifth step only."""
    return sum(belief * size * size for belief, size in zip(flicker, FLICKERS, strict=True))


def _flicker(
    beliefs: Sequence[float], prior: tuple[float, ...], *, gap: float, level: float, noise: float, step: int
) -> tuple[float, ...]:
    """Return the beliefs in each of `FLICKERS`, given how far the present mean of noise `noise` is from the filters."""
    # Successive gaps share most of their steps: their squares are correlated over 1/α of them.
    new = _FLICKER_EVERY * 2 / (now_steps(step) + 1)
    keep = 1 - _FLICKER_EVERY / step
    logs = []
    for belief, share, log_share, size in zip(beliefs, prior, _logs(prior), FLICKERS, strict=True):
        variance = noise + _FLICKER_LEFT * size * size * level * level
        square = min(gap * gap / variance, 1e300)
        likely = -0.5 * math.log(variance) - (_TAILS + 1) / 2 * math.log1p(square / _TAILS)
        logs.append(log_share + keep * math.log(belief / share) + new * likely)
    largest = max(logs)
    powers = [math.exp(log - largest) for log in logs]
    total = sum(powers)
    return tuple([max(power / total, 1e-12) for power in powers])


@functools.lru_cache(maxsize=8)
def _logs(shares: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(math.log(share) for share in shares)


def _mixed(memories: Sequence[Memory], *, noise: float) -> tuple[float, float]:
    """Return mean and variance of the level over all filters."""
    # About one of them, so that a scatter in the ninth digit is not lost in the squares.
    middle = memories[0][0]
    mean = spread = 0.0
    for level, _, var_level, _, _, belief in memories:
        offset = level - middle
        mean += belief * offset
        spread += belief * (var_level * noise + offset * offset)
    return middle + mean, max(spread - mean * mean, 0.0)


def _predicted(memories: Sequence[Memory], at: _Schedule, *, rescale: float, noise: float) -> list[Memory]:
    """Return the filters' predictions of a step, with their beliefs before its value is seen."""
    mean, spread = _mixed(memories, noise=noise / rescale)
    # Here and below NaN stays NaN.
    above = 0.0 if mean < 0.0 else mean
    # Evidence of long ago is forgotten, towards the prior.
    evidence = at.evidence
    powers = [prior * (memory[5] / prior) ** evidence for memory, prior in zip(memories, at.priors, strict=True)]
    total, kept, first = sum(powers), at.kept, at.first
    found = []
    for memory, power, handed_in, reach in zip(memories, powers, at.handed_in, at.reaches, strict=True):
        level, slope, var_level, cov, var_slope, _ = memory
        belief = kept * (power / total) + handed_in
        # A filter most of whose belief is handed in from the others takes over what they know: its own past is refuted.
        # Blending the states by their beliefs (the interacting multiple model) was tried: a thousandth of a belief in a
        # jump at each step, with its wide variance, read a constant course five times too wide.
        fresh = 2 * handed_in > belief
        if fresh:
            level, slope, var_level, cov, var_slope = mean, 0.0, spread / noise, 0.0, 0.0
        elif rescale != 1.0:
            var_level, cov, var_slope = var_level / rescale, cov / rescale, var_slope / rescale
        if reach is None:
            found.append((level, slope, var_level, cov, var_slope, belief))
            continue
        # A change by its own size within the reach is what a filter expects before it has seen any slope, and a change
        # of the slope by as much (a local linear trend; Harvey 1989, chapter 4). Hence the gain follows from noise and
        # level.
        widest = (above / reach) ** 2 / noise
        if fresh or first:
            var_slope = widest
        else:
            widened, limit = var_slope + widest / reach, var_slope if var_slope > widest else widest
            var_slope = limit if limit < widened else widened
        # The level goes by the slope, and the slope grows or falls with the level: it is the relative slope that stays,
        # for |G|² falls by factors, not by amounts. The exact Jacobian of that was tried, and is overconfident where
        # the level is hardly known (coverage 77 % after a jump at B = φ/10).
        factor = 1.0
        if level > 0 and level * level > var_level * noise:
            growth, most = slope / level, 2 / reach
            factor += most if growth > most else -most if growth < -most else growth
        found.append(
            (
                level + slope,
                slope * factor,
                var_level + 2 * cov + var_slope,
                (cov + var_slope) * factor,
                var_slope * factor * factor,
                belief,
            )
        )
    return found


def _corrected(before: Sequence[Memory], *, value: float, noise: float) -> tuple[Memory, ...]:
    """Return the filters with the value taken in, and believed by how well they predicted it."""
    squares = [(value - level) ** 2 / ((var_level + 1) * noise) for level, _, var_level, _, _, _ in before]
    # Relative to the best of them, so that none of it underflows where all were surprised.
    best = min(squares)
    likely = []
    for (_, _, var_level, _, _, belief), square in zip(before, squares, strict=True):
        excess = square - best
        excess = _LARGEST_EXCESS if excess > _LARGEST_EXCESS else excess
        likely.append(belief * math.exp(-0.5 * excess) / math.sqrt(var_level + 1))
    total = sum(likely)
    found = []
    for (level, slope, var_level, cov, var_slope, _), weight in zip(before, likely, strict=True):
        error, width, belief = value - level, var_level + 1, weight / total
        gain, slope_gain = var_level / width, cov / width
        found.append(
            (
                level + gain * error,
                slope + slope_gain * error,
                var_level * (1 - gain),
                cov * (1 - gain),
                var_slope - slope_gain * cov,
                _SMALLEST_BELIEF if belief < _SMALLEST_BELIEF else belief,
            )
        )
    return tuple(found)


def _centred(memories: Sequence[Memory], *, lag: float) -> float:
    found = 0.0
    for level, slope, _, _, _, belief in memories:
        found += belief * (level - lag * slope)
    return found


def present(drift: Drift, *, noise: float, step: int) -> tuple[float, float]:
    """Return the mean over the present and the variance of its error.

    Args:
        drift: after the last step.
        noise: variance of one value at the last step.
        step: its number.
    """
    at = _schedule(step)
    lag, num_now = at.lag, at.num_now
    slow_noise = noise + _noise_of_flicker(level_of(drift.memories), drift.flicker, at)
    centred, mean = [], 0.0
    for (level, slope, var_level, cov, var_slope, belief), share in zip(drift.memories, _PROCESS_SHARES, strict=True):
        var = var_level - 2 * lag * cov + lag * lag * var_slope
        # What lies a few steps back is better known than the end, but the value at the end bounds by how much.
        var = max(var, var_level / 4) * share
        middle = level - lag * slope
        mean += belief * middle
        centred.append((belief, middle, var * slow_noise))
    # The mean of the standard deviations, not of the variances: a small belief in a wide filter moves the quantile at
    # 95 % less than the variance.
    deviation = 0.0
    for belief, middle, var in centred:
        deviation += belief * math.sqrt(var + (middle - mean) ** 2)
    answers, answer = [], 0.0
    above = max(mean, 0.0)
    for belief, size in zip(drift.flicker, FLICKERS, strict=True):
        strays = at.outside * size * size * above * mean
        # The best weight of the plain present mean, of which `_OVERLAP` is the present, beside the filters.
        trust = _OVERLAP * strays / (strays + noise / num_now) if strays > 0 else 0.0
        var = deviation * deviation * (1 - trust * trust) + strays * (1 - _OVERLAP * trust)
        middle = mean + trust * (drift.recent - mean)
        answer += belief * middle
        answers.append((belief, middle, var))
    deviation = 0.0
    for belief, middle, var in answers:
        deviation += belief * math.sqrt(var + (middle - answer) ** 2)
    return answer, deviation * deviation
