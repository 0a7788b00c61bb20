"""The exact mean of the gradients, by DDP; and of experts that replicas share out, over the replicas that have them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.errors import ConfigError
from dptrain.exchange.base import Exchange, all_reduce_bytes, mean_of, num_bytes, total_norm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class AllReduce(Exchange):
    """Averages gradients over the replicas while the backward pass goes on."""

    name: ClassVar[str] = "all_reduce"
    parameters_are_equal: ClassVar[bool] = True

    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ANN401 - of DDP
        """Return the model in DDP; the model itself in one process."""
        return self._in_ddp(model, ignored_buffers=ignored_buffers, **ddp)

    def bytes_per_step(self) -> float | None:
        """Return the bytes of a ring all-reduce of the gradients; None where another wrapper reduces them."""
        return None if self._model is None else self._bytes

    @cached_property
    def _bytes(self) -> float:
        # DDP reduces the parameters that it was given as trained: they stay the same, and to count them takes as long
        # as a small layer.
        return all_reduce_bytes(num_bytes(self._trained()), num_replicas=self.num_replicas)


@runtime_checkable
class SharesExperts(Protocol):
    """A layer whose experts can be shared out."""

    def share_out(self, group: dist.ProcessGroup) -> tuple[str, ...]:
        """Keep this rank's part of the experts, and return the names of the parameters of which it has a part."""


class ExpertParallel(AllReduce):
    """Shares out the experts of a mixture over groups of replicas; the rest is averaged as by `AllReduce`.

    Replicas are laid out as (num_replicas / size, size), neighbours in one group. A group holds each expert once, so
    the gradient of an expert on one replica holds the samples of its group, and is averaged over the replicas with the
    same experts alone: one of each group. That is done after the backward pass, not while it goes on.

    Args:
        size: replicas in a group.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if self.num_replicas % size:
            raise ConfigError(
                f"execution.expert_parallel_size {size} does not divide the number of replicas, {self.num_replicas}: "
                f"start a multiple of {size} replicas"
            )
        self._size = size
        self._parts: dict[str, nn.Parameter] = {}
        self._mesh: DeviceMesh | None = None

    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ANN401 - of DDP
        """Return the model in DDP, its experts shared out.

        Raises:
            ConfigError: where the model has no experts, or they cannot be shared equally.
        """
        from torch.distributed.device_mesh import init_device_mesh

        layers = {name: module for name, module in model.named_modules() if isinstance(module, SharesExperts)}
        if not layers:
            raise ConfigError(
                f"execution.expert_parallel_size {self._size} needs a mixture of experts, as task gpt has with "
                f"num_experts: leave it out"
            )
        shape = self.num_replicas // self._size, self._size
        device = next(model.parameters()).device.type
        self._mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "expert"))
        group = self._mesh.get_group("expert")
        names = [
            f"{name}.{part}" if name else part for name, layer in layers.items() for part in layer.share_out(group)
        ]
        self._parts = {name: model.get_parameter(name) for name in names}
        return self._in_ddp(model, ignored_buffers={*ignored_buffers, *names}, **ddp)

    def combine(self) -> None:
        """Average the experts' gradients over the replicas that have the same experts."""
        grads = [part.grad for part in self._parts.values() if part.grad is not None]
        group, num_same = self._layout.get_group("replicate"), self.num_replicas // self._size
        means = mean_of(grads, group=group, num_replicas=num_same)
        for grad, mean in zip(grads, means, strict=True):
            # The sum over a group is there already: of all replicas it is the mean over them.
            torch.div(mean, self._size, out=grad)

    def grad_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the combined gradient, each expert counted once. A collective; no host sync."""
        parts = {id(part) for part in self._parts.values()}
        grads = {id(p): p.grad for p in parameters if p.grad is not None}
        rest = total_norm([grad for key, grad in grads.items() if key not in parts])
        own = total_norm([grad for key, grad in grads.items() if key in parts]).double().square()
        # Over all replicas and not over each group, whose sums might differ in the last bit: all clip by one norm.
        squares = own if self._layout.get_local_rank("replicate") == 0 else torch.zeros_like(own)
        dist.all_reduce(squares)
        return (rest.double().square() + squares).sqrt().to(rest.dtype)

    def part_of(self, name: str) -> tuple[int, int]:
        """Return which part of the experts this replica holds, where a parameter is theirs."""
        return (self._layout.get_local_rank("expert"), self._size) if name in self._parts else (0, 1)

    def placed(self, name: str, tensor: Tensor) -> Tensor:
        """Return a part of the experts' weights, or of their optimizer's state, as a distributed tensor."""
        part = self._parts.get(name)
        if part is None or tensor.shape != part.shape:
            return tensor
        from torch.distributed.tensor import DTensor, Replicate, Shard

        return DTensor.from_local(tensor.detach(), self._layout, (Replicate(), Shard(0)), run_check=False)

    def bytes_per_step(self) -> float | None:
        """Return None: how many tokens go to other replicas is decided by the router."""
        return None

    @property
    def _layout(self) -> DeviceMesh:
        return cast("DeviceMesh", self._mesh)
