"""The squared norm of the averaged gradient, which the optimizer gets; whole on each replica, or in shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.observe.geometry import Geometry, PlainGeometry, local
from dptrain.observe.groups import Groups


class GlobalGradient:
    """Reads `.grad` of the trained parameters.

    Args:
        parameters: those that are trained.
        groups: which of them belongs where.
        geometry: the norm.
        num_shards: ranks over which the gradient is cut up, 1 where each holds it whole.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, groups: Groups, geometry: Geometry, num_shards: int
    ) -> None:
        self._parameters = parameters
        self._groups = groups
        self._geometry = geometry
        self._num_shards = num_shards
        self._device = parameters[0].device
        self._distributed = hasattr(parameters[0], "to_local")
        self._zero = torch.zeros((), dtype=torch.float64, device=self._device)

    @torch.no_grad()
    def squares(self, *, grad_norm: Tensor | None = None) -> Tensor:
        """Return this rank's part of ‖g‖², by group, such that the mean over all ranks is ‖g‖².

        Where the gradient is whole, that is ‖g‖² itself. A shard's square is one of `num_shards` that add up, on
        each replica anew, and so counts `num_shards` times.

        Args:
            grad_norm: the norm of the whole where the loop has it already; not used where it cannot tell groups or
                another geometry.
        """
        plain = isinstance(self._geometry, PlainGeometry) and not self._groups.names and not self._groups.shares
        if plain and grad_norm is not None:
            whole = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            return whole.to(self._device, torch.float64).square().reshape(1)
        grads = {i: p.grad for i, p in enumerate(self._parameters) if p.grad is not None}
        if self._distributed:
            grads = {i: local(grad) for i, grad in grads.items()}
        grads = {i: grad.coalesce().values() if grad.is_sparse else grad for i, grad in grads.items()}
        if plain and grads and all(grad.dtype == torch.float32 for grad in grads.values()):
            squares = torch.nn.utils.get_total_norm(list(grads.values())).double().square().reshape(1)
        else:
            norms = {i: self._geometry.norm(i, grad) for i, grad in grads.items()}
            squares = self._groups.squares(norms, zero=self._zero)
        return squares * self._num_shards


_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name from torch 2.13
_BUCKET_ELEMENTS = 2**22
"""Of a bucket that is reduced at once: 16 MiB in single precision, the order of DDP's 25 MiB."""


class UnreducedGradient:
    """Squared norm of the mean of `.grad` over the ranks, in loops whose optimizer averages inside its step.

    Until then each rank's `.grad` is its own. At a measured step the gradients are reduced once more, bucket by bucket
    into shards of which only the norms are kept; `.grad` is not touched. That costs what the optimizer's own
    reduce-scatter costs, which the budget makes rare. To watch the optimizer's collectives instead would be free, but
    their buffers do not say which parameter they hold, nor by what they are divided afterwards.

    Args:
        parameters: those that are trained.
        groups: which of them belongs where.
        geometry: the norm.
        num_shards: not used: the shards are made here.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        groups: Groups,
        geometry: Geometry,
        num_shards: int,  # noqa: ARG002 - the form of `GlobalGradient`
    ) -> None:
        self._parameters = parameters
        self._groups = groups
        self._geometry = geometry
        self._zero = torch.zeros((), dtype=torch.float64, device=parameters[0].device)

    @torch.no_grad()
    def squares(self, *, grad_norm: Tensor | None = None) -> Tensor:  # noqa: ARG002 - the form of `GlobalGradient`
        """Return this rank's part of ‖mean of the ranks' gradients‖², by group, such that the mean over ranks is it.

        A collective. A parameter without a gradient on this rank counts as zero.
        """
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        norms: dict[int, Tensor] = {}
        for bucket in _buckets(self._parameters):
            shard, begins = self._reduced_shard(bucket, world_size)
            norms |= self._norms_of_shard(bucket, shard / world_size, begins=begins)
        return self._groups.squares(norms, zero=self._zero) * world_size

    def _reduced_shard(self, bucket: list[int], world_size: int) -> tuple[Tensor, int]:
        """Return this rank's piece of the sum over the ranks of a bucket, and where in the bucket it begins."""
        parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in (self._parameters[i] for i in bucket)]
        dtype = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
        flat = torch.cat([part.flatten().to(dtype) for part in parts])
        if world_size == 1:
            return flat, 0
        piece = -(-flat.numel() // world_size)
        flat = torch.nn.functional.pad(flat, (0, piece * world_size - flat.numel()))
        shard = torch.empty(piece, dtype=dtype, device=flat.device)
        _reduce_scatter(shard, flat)
        return shard, piece * dist.get_rank()

    def _norms_of_shard(self, bucket: list[int], shard: Tensor, *, begins: int) -> dict[int, Tensor]:
        norms, offset = {}, 0
        for index in bucket:
            size = self._parameters[index].numel()
            first, last = max(offset - begins, 0), min(offset + size - begins, shard.numel())
            if first < last:
                norms[index] = self._geometry.norm(index, shard[first:last])
            offset += size
        return norms


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[int]]:
    """Return the parameters' numbers in buckets of one precision."""
    buckets: list[list[int]] = []
    filled, dtype = 0, None
    for index, parameter in enumerate(parameters):
        if not buckets or filled + parameter.numel() > _BUCKET_ELEMENTS or parameter.dtype != dtype:
            buckets.append([])
            filled, dtype = 0, parameter.dtype
        buckets[-1].append(index)
        filled += parameter.numel()
    return buckets
