"""What replicas exchange in a step: the interface of every kind, and what each must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Exchange(ABC):
    """One way in which replicas work on one model.

    A loop wraps its model, calls `combine` after the last backward pass of a step and `updated` after
    `optimizer.step()`, and does not know which kind it has:

    ```python
    exchange = AllReduce()
    model = exchange.wrap(model)
    for batch in data:
        ...                         # forward and backward passes
        exchange.combine()          # gradients are what the optimizer shall get
        optimizer.step()
        exchange.updated()          # parameters are what the next step begins with
    ```

    Args:
        group: process group; None for the default one. Without a process group there is one replica.
    """

    name: ClassVar[str]
    """As in `--exchange.kind`."""
    parameters_are_equal: ClassVar[bool]
    """Whether all replicas have equal parameters after every step."""
    no_noise_scale: ClassVar[str | None] = None
    """Why the noise scale is not defined under this kind; None where it is."""

    def __init__(self, *, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        is_distributed = dist.is_available() and dist.is_initialized()
        self.num_replicas = dist.get_world_size(group) if is_distributed else 1
        self.rank = dist.get_rank(group) if is_distributed else 0
        self._model: nn.Module | None = None

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module that the loop calls; all replicas start from the parameters of rank 0."""

    def combine(self) -> None:  # noqa: B027 - nothing where the wrapper has combined them
        """Turn this replica's gradients into those that the optimizer shall get. A collective."""

    def updated(self) -> None:  # noqa: B027 - where gradients are exchanged, parameters need not be
        """Note that the optimizer has stepped; exchange parameters where it is time. A collective at such steps."""

    @abstractmethod
    def bytes_per_step(self) -> float:
        """Return the bytes that one replica sends in a step, the mean over steps, without the transport's headers."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: tensors and plain values."""
        return {}

    def load_state_dict(self, record: Mapping[str, Any]) -> None:  # noqa: B027 - most kinds remember nothing
        """Go on from a `state_dict`."""

    # For the kinds

    def _trained(self) -> list[nn.Parameter]:
        assert self._model is not None, "call wrap first"
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _begin_equal(self, model: nn.Module) -> None:
        """Give all replicas the parameters and buffers of rank 0."""
        self._model = model
        if self.num_replicas > 1:
            root = dist.get_global_rank(self.group, 0) if self.group is not None else 0
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.data, src=root, group=self.group)

    def _mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over the replicas, in place."""
        if self.num_replicas > 1:
            dist.all_reduce(tensor, group=self.group)
            tensor /= self.num_replicas
        return tensor


def all_reduce_bytes(num_bytes: float, *, num_replicas: int) -> float:
    """Return what one replica sends in a ring all-reduce: a scatter and a gather of all but its own share."""
    return 2 * num_bytes * (num_replicas - 1) / num_replicas


def num_bytes(tensors: list[nn.Parameter]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def flat(tensors: list[Tensor]) -> Tensor:
    """Return some tensors as one vector, a copy."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
