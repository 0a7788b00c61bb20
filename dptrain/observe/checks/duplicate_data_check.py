"""Notices replicas that are not independent; it compares squared norms, and never data."""

from __future__ import annotations

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.observe.reduction import PendingSum

_ALIKE = 2e-6
"""Relative difference of squared norms that rounding explains where the same samples come in another order. Two ranks
with samples of their own come as near about once in 10⁶ comparisons, and twice in a row once in 10¹²."""


class DuplicateDataCheck:
    """Finds ranks whose own gradients are equal but for rounding, which happens where they see the same samples.

    Two ranks with the same data, or the same seed of the sampler, are one small batch counted twice: tr(Σ) then
    comes out too small, and the noise scale with it. At the measured steps 1, 2, 10, 100, 1000, … all ranks tell one
    another the squared norm of their own gradients. Ranks that agree in two such steps in a row are reported: one
    agreement may be chance where a gradient has few values.

    It does not see samples that overlap only partly, nor equal samples under different dropout.

    Args:
        group: over which gradients are averaged.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._suspects: set[tuple[int, ...]] = set()
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
        groups: list[list[int]] = []
        previous = -math.inf
        for square, rank in order:
            if square - previous > _ALIKE * square:
                groups.append([])
            groups[-1].append(rank)
            previous = square
        equal = {tuple(sorted(found)) for found in groups if len(found) > 1}
        self.identical_ranks = tuple(sorted(equal & self._suspects))
        self._suspects = equal
        if self.identical_ranks and not self._warned:
            self._warned = True
            if dist.get_rank(self._group) == 0:
                warnings.warn(
                    f"ranks {_text(self.identical_ranks)} have the same gradients but for rounding: they see the same "
                    "samples, so the noise scale comes out too small; give each rank samples of its own, such as by "
                    "a DistributedSampler or a seed that contains the rank",
                    stacklevel=2,
                )


def is_check(number: int) -> bool:
    """Say whether the measured step of this number, from 1, is compared: 1, 2, 10, 100, 1000, …."""
    return number == 2 or str(number).strip("0") == "1"  # noqa: PLR2004 - two in a row are needed early


def _text(found: tuple[tuple[int, ...], ...]) -> str:
    return "; ".join(" and ".join(map(str, ranks)) for ranks in found)
