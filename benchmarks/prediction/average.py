"""The run-averaged noise scale, from dptrain's own estimator on the squared norms of each step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dptrain.noise import MomentSums, Smoothing, SquaredNorms, noise_scale, smoothed, unbiased_moments

_NUM_WINDOWS = 10
_PLAIN_MEAN = Smoothing(half_life_samples=math.inf)


@dataclass(frozen=True, kw_only=True)
class RunAverage:
    """The noise scale φ of a run at one batch B, averaged in two ways; in samples.

    Attributes:
        over_steps: each step counts the same, and so does each sample.
        over_progress: each step counts by the progress that it makes, 1/(1 + φ/B) of a step without noise; where the
            learning rate is the best one everywhere, this mean is the critical batch (formula F15: B_crit of a fixed
            batch is the mean of φ over S_min noiseless steps).
    """

    over_steps: float
    over_progress: float


def run_average(runs: Sequence[Sequence[SquaredNorms]]) -> RunAverage | None:
    """Return the mean noise scale of a run; None where it was resolved nowhere.

    Each run is cut into ten windows of equal length. In a window |G|² and tr(Σ) are averaged over steps and runs, and
    divided last. The mean over windows gives each part of the run its length as weight, whereas one ratio over the
    whole would see the start alone, where |G|² is largest. A window whose |G|² is not distinguishable from zero
    is taken together with the next, at the end with the one before.

    Args:
        runs: the squared norms of each step of each run; the runs differ in their samples only.
    """
    groups: list[list[list[SquaredNorms]]] = [[]]
    for index in range(_NUM_WINDOWS):
        groups[-1].append([step for run in runs for step in _window(run, index)])
        if _pooled(groups[-1]) is not None:
            groups.append([])
    left = groups.pop()
    if not groups:
        return None
    groups[-1] += left
    scales = [scale for group in groups for scale in [_pooled(group)] * len(group) if scale is not None]
    if not scales:
        return None
    batch_size = runs[0][0].num_samples
    progress = [1 / (1 + scale / batch_size) for scale in scales]
    return RunAverage(
        over_steps=sum(scales) / len(scales),
        over_progress=sum(share * scale for share, scale in zip(progress, scales, strict=True)) / sum(progress),
    )


def _window(run: Sequence[SquaredNorms], index: int) -> Sequence[SquaredNorms]:
    return run[len(run) * index // _NUM_WINDOWS : len(run) * (index + 1) // _NUM_WINDOWS]


def _pooled(windows: Iterable[Iterable[SquaredNorms]]) -> float | None:
    sums = MomentSums()
    for norms in itertools.chain.from_iterable(windows):
        moments = unbiased_moments(norms)
        if moments is not None:
            sums = _PLAIN_MEAN.update(sums, moments)
    return noise_scale(smoothed(sums)).value
