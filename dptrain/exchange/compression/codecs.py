"""Means over the replicas of gradients in fewer digits, each with what this replica must add next time to lose nothing.

A codec sees one bucket of DDP, or all of a step, but treats each parameter by itself: DDP lays out its buckets anew
after the first step of a process, and a resumed run must not notice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dptrain.exchange.base import all_gather_into

_LARGEST = 127  # of int8, symmetric round zero


class Codec(ABC):
    """Sends gradients in fewer digits.

    Args:
        group: process group; None for the default one.
    """

    sends_all_at_once: ClassVar[bool] = False
    """Whether it is given the gradients of all buckets together, after the last: its messages are so small that their
    number costs more than overlapping them with the backward pass saves."""

    def __init__(self, *, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._rank = dist.get_rank(group) if self._size > 1 else 0

    @abstractmethod
    def mean(self, exact: Sequence[Tensor], keys: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the means over the replicas, and what this replica's part of them lacks. A collective.

        The mean over the replicas of what is lacking is the exact mean less the one returned, to float rounding.

        Args:
            exact: gradients of one precision, each in its parameter's shape.
            keys: names of the parameters.
        """

    @abstractmethod
    def num_bytes(self, parameter: Tensor, *, num_replicas: int) -> float:
        """Return the bytes of one copy of a parameter's gradient as it is sent; a reduction has it of each replica."""


class HalfPrecision(Codec):
    """Numbers of 16 bits, added up in full precision.

    Each replica adds up its share of every gradient and sends the mean on, rounded once more: a sum in half precision
    would lose a bit for each doubling of the replicas, and nobody would know what it lost.

    Args:
        dtype: float16 or bfloat16.
        group: process group; None for the default one.
    """

    def __init__(self, dtype: torch.dtype, *, group: dist.ProcessGroup | None) -> None:
        super().__init__(group=group)
        self._dtype = dtype

    def mean(self, exact: Sequence[Tensor], keys: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:  # noqa: ARG002 - of PowerSGD
        """Return the means and what this replica lost."""
        rows = _shares(exact, self._size)
        sent = rows.to(self._dtype)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        mean = received.to(rows.dtype).mean(0)
        answer = mean.to(self._dtype)
        answers = torch.empty_like(sent)
        all_gather_into(answers, answer[None], group=self._group)
        lost = rows - sent.to(rows.dtype)
        lost[self._rank] += self._size * (mean - answer.to(rows.dtype))
        return _whole(answers.to(rows.dtype), exact), _whole(lost, exact)

    def num_bytes(self, parameter: Tensor, *, num_replicas: int) -> float:  # noqa: ARG002 - of int8
        """Return two bytes a number."""
        return 2.0 * parameter.numel()


class Int8(Codec):
    """Whole numbers of 8 bits with a scale for each parameter, added up in full precision as `HalfPrecision`."""

    def mean(self, exact: Sequence[Tensor], keys: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:  # noqa: ARG002 - of PowerSGD
        """Return the means and what this replica lost."""
        rows = _shares(exact, self._size)
        scale = torch.stack([tensor.abs().amax() for tensor in exact]) / _LARGEST
        scales = scale.new_empty(self._size, len(exact))
        all_gather_into(scales, scale[None], group=self._group)
        widths = torch.tensor([_share(t, self._size) for t in exact], device=rows.device)

        def columns(of: Tensor) -> Tensor:
            return of.repeat_interleave(widths, dim=-1)

        own = columns(scale)
        codes = _codes(rows, own)
        received = torch.empty_like(codes)
        dist.all_to_all_single(received, codes, group=self._group)
        mean = (received.to(rows.dtype) * columns(scales)).mean(0)
        # No mean is larger than the mean of the replicas' largest, so all know its scale without a further message.
        common = columns(scales.mean(0))
        answer = _codes(mean, common)
        answers = torch.empty_like(codes)
        all_gather_into(answers, answer[None], group=self._group)
        lost = rows - codes.to(rows.dtype) * own
        lost[self._rank] += self._size * (mean - answer.to(rows.dtype) * common)
        return _whole(answers.to(rows.dtype) * common, exact), _whole(lost, exact)

    def num_bytes(self, parameter: Tensor, *, num_replicas: int) -> float:
        """Return one byte a number; its scale of four bytes goes to each other replica once, half of a reduction."""
        return parameter.numel() + parameter.element_size() / 2 * num_replicas


class PowerSgd(Codec):
    """Rank-r factors of each matrix by one step of the power method (Vogels et al. 2019, arXiv 1905.13727).

    Written out instead of torch's hook, which keeps errors and factors by bucket: they could not be saved. Vectors, and
    matrices whose factors are not less than half of them, are sent whole. A step takes two reductions, whatever the
    number of buckets: the left factors with all that is sent whole, then the right factors.

    Args:
        rank: of the factors.
        group: process group; None for the default one.
    """

    sends_all_at_once: ClassVar[bool] = True

    def __init__(self, rank: int, *, group: dist.ProcessGroup | None) -> None:
        super().__init__(group=group)
        self._rank_of_factors = rank
        self.factors: dict[str, Tensor] = {}
        """The right factor of the latest step by parameter, from which the next one begins; equal on all replicas."""

    def mean(self, exact: Sequence[Tensor], keys: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the means and what this replica lost."""
        cut = [index for index, tensor in enumerate(exact) if self._is_cut(tensor)]
        matrices = {index: exact[index].reshape(exact[index].shape[0], -1) for index in cut}
        lefts = {index: matrix @ self._factor(keys[index], matrix) for index, matrix in matrices.items()}
        whole = [tensor for index, tensor in enumerate(exact) if index not in matrices]
        reduced = self._mean([*lefts.values(), *whole])
        bases = [torch.linalg.qr(left).Q for left in reduced[: len(cut)]]
        own = [matrices[index].T @ basis for index, basis in zip(cut, bases, strict=True)]
        rights = self._mean(own)
        means, lost = iter(reduced[len(cut) :]), {}
        found: dict[int, Tensor] = {}
        for index, basis, mine, right in zip(cut, bases, own, rights, strict=True):
            found[index] = (basis @ right.T).view_as(exact[index])
            lost[index] = (matrices[index] - basis @ mine.T).view_as(exact[index])
            # A step that is skipped for numbers that are not finite must not end up in all later ones.
            self.factors[keys[index]] = torch.where(right.isfinite().all(), right, self.factors[keys[index]])
        return (
            [found[index] if index in found else next(means) for index in range(len(exact))],
            [lost[index] if index in lost else torch.zeros_like(tensor) for index, tensor in enumerate(exact)],
        )

    def num_bytes(self, parameter: Tensor, *, num_replicas: int) -> float:  # noqa: ARG002 - of int8
        """Return the bytes of the two factors, or of the whole."""
        if not self._is_cut(parameter):
            return float(parameter.numel() * parameter.element_size())
        return float(self._num_factors(parameter) * parameter.element_size())

    def _is_cut(self, tensor: Tensor) -> bool:
        return tensor.dim() > 1 and 2 * self._num_factors(tensor) < tensor.numel()

    def _num_factors(self, tensor: Tensor) -> int:
        rows, columns = tensor.shape[0], tensor[0].numel()
        return min(self._rank_of_factors, rows, columns) * (rows + columns)

    def _factor(self, key: str, matrix: Tensor) -> Tensor:
        if key not in self.factors:
            rank = min(self._rank_of_factors, *matrix.shape)
            # On the host and from the shape alone: equal on all replicas, and in a run that is begun again.
            generator = torch.Generator().manual_seed(matrix.shape[1])
            drawn = torch.randn(matrix.shape[1], rank, generator=generator, dtype=torch.float64)
            self.factors[key] = drawn.to(device=matrix.device, dtype=matrix.dtype)
        return self.factors[key]

    def _mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if not tensors:
            return []
        vector = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if self._size > 1:
            dist.all_reduce(vector, group=self._group)
            vector /= self._size
        parts = torch.split(vector, [tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def build_codec(name: str, *, rank: int, group: dist.ProcessGroup | None) -> Codec:
    """Return a codec by name; rank is PowerSGD's."""
    makers: dict[str, Callable[[], Codec]] = {
        "fp16": lambda: HalfPrecision(torch.float16, group=group),
        "bf16": lambda: HalfPrecision(torch.bfloat16, group=group),
        "int8": lambda: Int8(group=group),
        "powersgd": lambda: PowerSgd(rank, group=group),
    }
    return makers[name]()


def _codes(numbers: Tensor, scale: Tensor) -> Tensor:
    return torch.where(scale > 0, numbers / scale, torch.zeros_like(numbers)).round().to(torch.int8)


def _share(tensor: Tensor, size: int) -> int:
    return -(-tensor.numel() // size)


def _shares(tensors: Sequence[Tensor], size: int) -> Tensor:
    """Return (replicas, numbers): row k is what replica k adds up, its share of each tensor side by side."""
    parts = []
    for tensor in tensors:
        share = _share(tensor, size)
        parts.append(functional.pad(tensor.reshape(-1), (0, share * size - tensor.numel())).view(size, share))
    return torch.cat(parts, dim=1)


def _whole(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `_shares`."""
    columns = torch.split(rows, [_share(tensor, len(rows)) for tensor in like], dim=1)
    return [part.reshape(-1)[: tensor.numel()].view_as(tensor) for part, tensor in zip(columns, like, strict=True)]
