"""Notices micro-batches that differ in kind by their place in the step, such as a GAN's real and generated samples."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence

_CHANCE = 1e-5
"""Of a warning in a correct loop, over its whole length."""
_EFFECT = 0.4
"""Mean of the scores over their root mean square from which on a difference is reported. Data that is never shuffled
gives 3·√(b/n), with b samples a micro-batch, n samples that come at each place, and 9 contrasts a step: less than this
from n = 56·b on, where tr(Σ) is 2 % too large at most."""
_PRIOR = 1.0
"""Variance process at which the bound is tightest; it hardly matters."""
_SHRINKAGE = 4.0
"""Evidence of a contrast's own past at which its weight is halved, so that chance does not drown one that tells."""

MIXED = (
    "the micro-batches at different places of a step differ in kind (p < 1e-5 by chance), such as two losses with a "
    "backward pass each, weights that the meter is not told, or samples in a fixed order; the difference is counted as "
    "noise: add up the losses before one backward(), give weights to meter.begin(num_samples=, weight=), or shuffle "
    "the samples"
)


def halves(num_micro_batches: int, *, number: int) -> tuple[range, range]:
    """Return the places of two sets of micro-batches of equal number, which a correct loop could exchange.

    Args:
        num_micro_batches: of this rank in the step.
        number: of the measured step: odd ones compare neighbours, even ones the first half with the last.
    """
    half = num_micro_batches // 2
    if number % 2:
        return range(0, 2 * half, 2), range(1, 2 * half, 2)
    return range(half), range(num_micro_batches - half, num_micro_batches)


class Exchangeability:
    """Tests whether a step's micro-batches could be exchanged, from contrasts between two sets of them.

    Where they could, each contrast is symmetric round zero, whatever its distribution. So the past of the contrasts
    does not tell the sign of the next ones. Each step's contrasts are added up with weights from their past, as a bet
    on persistent signs, and divided by the sum of their magnitudes: a score in [−1, 1]. With S the sum of the scores
    and V that of their squares, P(S²/(V+ρ) > ln((V+ρ)/ρ) + 2·ln(1/p) at any time) ≤ p: the method of mixtures for
    self-normalised sums (de la Peña, Klass and Lai 2004). So looking at every step costs nothing.
    """

    def __init__(self) -> None:
        self._keys: deque[list[Hashable]] = deque()
        self._past: dict[Hashable, tuple[float, float]] = {}
        self._sum = self._squares = 0.0
        self._num_steps = 0
        self.found = False

    def expect(self, keys: list[Hashable]) -> None:
        """Know what the contrasts of the step that is being reduced are; once for each call of `judge`, in order."""
        self._keys.append(keys)

    def judge(self, contrasts: Sequence[float], *, valid: bool) -> bool:
        """Take in the contrasts of the oldest step that is expected; return whether a difference was found just now.

        Args:
            contrasts: summed over the ranks, each relative to its own magnitude.
            valid: whether the step's gradients were found to belong together.
        """
        keys = self._keys.popleft()
        if not valid or not all(map(math.isfinite, contrasts)):
            return False
        bets = [self._weight(key) * contrast for key, contrast in zip(keys, contrasts, strict=False)]
        for key, contrast in zip(keys, contrasts, strict=False):
            total, squares = self._past.get(key, (0.0, 0.0))
            self._past[key] = total + contrast, squares + contrast * contrast
        size = sum(map(abs, bets))
        if size == 0:
            return False
        score = sum(bets) / size
        self._sum += score
        self._squares += score * score
        self._num_steps += 1
        if self.found or not self._is_persistent():
            return False
        self.found = True
        return True

    def _weight(self, key: Hashable) -> float:
        total, squares = self._past.get(key, (0.0, 0.0))
        if squares == 0:
            return 0.0
        evidence = total * total / squares  # 1 by chance
        return total / squares * evidence / (evidence + _SHRINKAGE)

    def _is_persistent(self) -> bool:
        variance = self._squares + _PRIOR
        evidence = self._sum * self._sum / (2 * variance) - math.log(variance / _PRIOR) / 2
        enough = self._sum**2 >= _EFFECT**2 * self._num_steps * self._squares
        return self._sum > 0 and evidence > math.log(1 / _CHANCE) and enough
