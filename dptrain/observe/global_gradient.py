"""The squared norm of the combined gradient, which the optimizer gets; whole on each replica, or in shards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        plain = isinstance(self._geometry, PlainGeometry) and not self._groups.names
        if plain and grad_norm is not None:
            whole = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
            return whole.to(self._device, torch.float64).square().reshape(1)
        grads = {i: p.grad for i, p in enumerate(self._parameters) if p.grad is not None}
        if self._distributed:
            grads = {i: local(grad) for i, grad in grads.items()}
        if plain and grads and all(grad.dtype == torch.float32 for grad in grads.values()):
            squares = torch.nn.utils.get_total_norm(list(grads.values())).double().square().reshape(1)
        else:
            norms = {i: self._geometry.norm(i, grad) for i, grad in grads.items()}
            squares = self._groups.squares(norms, zero=self._zero)
        return squares * self._num_shards
