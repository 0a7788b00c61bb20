"""Notices replicas that are not independent; it compares squared norms, and never data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.observe.reduction import PendingSum

_ALIKE = 2e-6
"""Relative difference of squared norms that rounding explains where the same samples come in another order."""
_BY_CHANCE = 0.01
"""Pairs of ranks with samples of their own that may come as near in one look; where more are to be expected, as on
thousands of ranks or with huge batches, only equal bits count. Three looks in a row leave a chance of 1e-6."""
_LOOKS_EQUAL, _LOOKS_ALIKE = 2, 3
"""Looks in a row in which ranks agree, to the last bit or but for rounding, until they are reported."""


class DuplicateDataCheck:
    """Finds ranks whose own gradients are equal but for rounding, which happens where they see the same samples.

    Two ranks with the same data, or the same seed of the sampler, are one small batch counted twice: tr(Σ) then
    comes out too small, and the noise scale with it. At the measured steps 1, 2, 10, 100, 1000, … all ranks tell one
    another the squared norm of their own gradients. Ranks that agree to the last bit in two such steps in a row, or but
    for rounding in three, are reported: one agreement may be chance where a gradient has few values.

    It does not see samples that overlap only partly, nor equal samples under different dropout.

    Args:
        group: over which gradients are averaged.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._looks: dict[tuple[int, ...], int] = {}
        self._warned = False
        self.identical_ranks: tuple[tuple[int, ...], ...] = ()

    def exchange(self, square: Tensor, *, number: int) -> PendingSum | None:
        """Start comparing if the measured step of this `number`, from 1, is one for it. A collective; no wait.

        Args:
            square: this rank's own, a float64 scalar; 0 for one that has nothing to compare.
            number: of the measured step, equal on all ranks.
        """
        if not is_check(number) or not (dist.is_available() and dist.is_initialized()):
            return None
        # A sum of vectors that are zero but for the own entry; adding zeros keeps every bit.
        entries = torch.zeros(dist.get_world_size(self._group), dtype=torch.float64, device=square.device)
        entries[dist.get_rank(self._group)] = square
        return PendingSum(entries, group=self._group)

    def judge(self, squares: list[float]) -> None:
        """Compare the squares of all ranks; the result is the same on each."""
        order = sorted((square, rank) for rank, square in enumerate(squares) if math.isfinite(square) and square > 0)
        equal, alike = (_groups(order, within=within) for within in (0.0, _ALIKE))
        found = equal if _is_crowded(order, num_apart=len(alike)) else alike
        agreeing = [tuple(sorted(group)) for group in found if len(group) > 1]
        self._looks = {ranks: self._looks.get(ranks, 0) + 1 for ranks in agreeing}
        to_the_bit = {tuple(sorted(group)) for group in equal}
        self.identical_ranks = tuple(
            ranks
            for ranks, looks in sorted(self._looks.items())
            if looks >= (_LOOKS_EQUAL if ranks in to_the_bit else _LOOKS_ALIKE)
        )
        if self.identical_ranks and not self._warned:
            self._warned = True
            if dist.get_rank(self._group) == 0:
                warnings.warn(
                    f"ranks {_text(self.identical_ranks)} have the same gradients but for rounding: they see the same "
                    "samples, so the noise scale comes out too small; give each rank samples of its own, such as by "
                    "a DistributedSampler or a seed that contains the rank",
                    stacklevel=2,
                )


def _groups(order: Sequence[tuple[float, int]], *, within: float) -> list[list[int]]:
    """Return ranks in groups whose squares differ from the group's first by a share of at most `within`."""
    groups: list[list[int]] = []
    first = -math.inf
    for square, rank in order:
        if square - first > within * square:
            groups.append([])
            first = square
        groups[-1].append(rank)
    return groups


def _is_crowded(order: Sequence[tuple[float, int]], *, num_apart: int) -> bool:
    """Whether the squares lie so close that ranks with samples of their own come near one another by chance.

    Args:
        order: (square, rank), rising.
        num_apart: of squares that differ by more than rounding.
    """
    if num_apart < 3:  # noqa: PLR2004 - of two squares nothing says how far apart others would be
        return False
    spread = order[-1][0] - order[0][0]
    return num_apart**2 * _ALIKE * order[-1][0] > _BY_CHANCE * spread


def is_check(number: int) -> bool:
    """Say whether the measured step of this number, from 1, is compared: 1, 2, 10, 100, 1000, …."""
    return number == 2 or str(number).strip("0") == "1"  # noqa: PLR2004 - two in a row are needed early


def _text(found: tuple[tuple[int, ...], ...]) -> str:
    return "; ".join(" and ".join(map(str, ranks)) for ranks in found)
