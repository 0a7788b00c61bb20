"""The branched critical batch size: what the losses of branches at growing batches say; nothing is trained here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Branched:
    """What branches from one checkpoint found (Merrill et al. 2025, arXiv 2505.23971).

    Attributes:
        losses: held-out loss after the window, by multiple of the batch; NaN for one that diverged.
        tolerance: by how much a loss may be above that of the smallest multiple.
        largest_multiple: the largest that is no worse, as are all smaller ones.
        is_open: whether it is the largest that was tried, so that the critical batch may be larger.
        first_worse: the smallest multiple that is worse; None where none is.
    """

    losses: Mapping[int, float]
    tolerance: float
    largest_multiple: int
    is_open: bool
    first_worse: int | None

    @property
    def only_below(self) -> bool:
        """Whether already the second multiple is worse: then only an upper bound of the critical batch is known.

        The batch in force is "no worse" than itself by definition, which says nothing about it.
        """
        return self.first_worse is not None and self.largest_multiple == min(self.losses)


def branched(losses: Mapping[int, float], *, tolerance: float) -> Branched:
    """Judge the branches of one checkpoint.

    The critical batch is the largest multiple whose loss is at most that of the smallest one and a tolerance, for it
    and for every smaller one: a larger batch that happens to do well again does not count.

    Args:
        losses: held-out loss after the same samples, by multiple of the batch.
        tolerance: in the unit of the loss; Merrill et al. take 0.01 nats per token.

    Raises:
        ConfigError: where the smallest multiple has no loss to compare with.
    """
    multiples = sorted(losses)
    base = losses[multiples[0]]
    if not math.isfinite(base):
        raise ConfigError(f"the branch at {multiples[0]} × the batch diverged: there is nothing to compare with")
    # A NaN is no loss at all.
    worse = next((multiple for multiple in multiples[1:] if not losses[multiple] <= base + tolerance), None)
    largest = multiples[-1] if worse is None else multiples[multiples.index(worse) - 1]
    return Branched(
        losses=dict(losses),
        tolerance=tolerance,
        largest_multiple=largest,
        is_open=largest == multiples[-1],
        first_worse=worse,
    )
