"""What replicas exchange in a step: the interface of every kind, and what each must say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dptrain.observe.hooks.wrapping import refuse_measuring

all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name from torch 2.15
"""(output, input, group=, async_op=): the replicas' tensors one after the other along the first dimension."""

State = Mapping[str, Any]
"""What a checkpoint holds of a kind: names without a slash at their ends → tensors, or plain values."""

SharedLoss = Callable[[nn.Module, int], Tensor]
"""(what is called in place of the model, number of the step) → a loss that called it on the step's shared samples."""


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
    begins_apart: ClassVar[bool] = False
    """Whether each replica shall begin with parameters of its own."""
    own_state: ClassVar[bool] = False
    """Whether each replica has a `state_dict` of its own."""
    on_other_replicas: str | None = None
    """Why a run cannot go on with another number of replicas; None where it can."""
    no_noise_scale: str | None = None
    """Why the noise scale is not defined under this kind; None where it is."""

    def __init__(self, *, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        is_distributed = dist.is_available() and dist.is_initialized()
        self.num_replicas = dist.get_world_size(group) if is_distributed else 1
        self.rank = dist.get_rank(group) if is_distributed else 0
        self._model: nn.Module | None = None

    @abstractmethod
    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ANN401 - whatever DDP takes
        """Return the module that the loop calls.

        All replicas start from the parameters of rank 0, unless the kind begins apart.

        Args:
            model: not wrapped.
            ignored_buffers: those that DDP need not copy from rank 0.
            ddp: further options of `DistributedDataParallel`, where the kind uses it.
        """

    def hook(self) -> tuple[Any, object] | None:
        """Return (hook, state) for DDP's slot, for a meter that has it; None where the kind needs none."""
        return None

    def share(self, loss: SharedLoss) -> None:  # noqa: B027 - most kinds share no samples
        """Take what runs the model on samples that all replicas see, for kinds that exchange predictions."""

    def combine(self) -> None:  # noqa: B027 - nothing where the wrapper has combined them
        """Turn this replica's gradients into those that the optimizer shall get. A collective."""

    def updated(self) -> None:  # noqa: B027 - where gradients are exchanged, parameters need not be
        """Note that the optimizer has stepped; exchange parameters where it is time. A collective at such steps."""

    def replaced(self) -> None:  # noqa: B027 - most kinds remember no parameters
        """Note that the parameters were replaced from outside, as those of a checkpoint to begin from."""

    def grad_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the gradient that `combine` has made, the same on all replicas. No host sync.

        A collective where replicas hold parts of the model.

        Args:
            parameters: those that are trained.
        """
        return norm_of_whole(parameters)

    def part_of(self, name: str) -> tuple[int, int]:  # noqa: ARG002 - of a kind that cuts parameters up
        """Return which part of a parameter this replica holds, from 0, and of how many."""
        return 0, 1

    def placed(self, name: str, tensor: Tensor) -> Tensor:  # noqa: ARG002 - of a kind that cuts parameters up
        """Return what belongs to a parameter, for a checkpoint: a distributed tensor where it is of a part.

        Args:
            name: of the parameter.
            tensor: itself, or state of the optimizer; shares memory with what is returned.
        """
        return tensor

    @property
    def may_differ(self) -> bool:
        """Whether replicas may have different parameters at this moment."""
        return not self.parameters_are_equal

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
        """Give the model whose held-out figures are the run's, and whether every replica shall see all samples.

        A collective. Where replicas see all samples the figures are means over the replicas.

        Args:
            model: not wrapped.
        """
        yield model, False

    @abstractmethod
    def bytes_per_step(self) -> float | None:
        """Return the bytes that one replica hands to its collectives in a step, the mean over steps.

        Without the headers of packets and the transport's own messages, which count where little is sent
        (`benchmarks/results/exchange.md`). None where that is not known: before a kind has seen its first step, or
        where parameters are sharded.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: names → tensors and plain values."""
        return {}

    def load_state_dict(self, record: State) -> None:  # noqa: B027 - most kinds remember nothing
        """Go on from a `state_dict`."""

    def load_from_others(self, records: Sequence[State]) -> None:
        """Go on from the states of another number of replicas, in the order of their ranks."""
        assert self.on_other_replicas is None, self.on_other_replicas
        self.load_state_dict(records[0])

    # For the kinds

    def _without_noise_scale(self, model: nn.Module) -> nn.Module:
        """Have meters refuse a module with the kind's reason."""
        assert self.no_noise_scale is not None
        refuse_measuring(model, self.no_noise_scale)
        return model

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

    def _in_ddp(self, model: nn.Module, *, ignored_buffers: Collection[str], **options: Any) -> nn.Module:  # noqa: ANN401 - of DDP
        self._model = model
        if self.num_replicas == 1:
            return model
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored_buffers))  # type: ignore[no-untyped-call] # noqa: SLF001 - torch names no other way
        # Gradients that are views into the buckets are copied neither in nor out, and take memory once: 13 to 17 % of
        # the CPU time of a step of 12 million parameters.
        return DistributedDataParallel(model, process_group=self.group, gradient_as_bucket_view=True, **options)


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients together; a collective where they are sharded. No host sync.

    `torch.nn.utils.get_total_norm` sorts the gradients by device and type first, and on a CPU takes them one by one in
    Python: 4 µs each.
    """
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))  # noqa: SLF001 - torch's own use
    return cast("Tensor", cast("Any", norm).full_tensor()) if hasattr(norm, "full_tensor") else norm


def norm_of_whole(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of the gradient of parameters that this replica has whole, or in shards of FSDP."""
    return total_norm([p.grad for p in parameters if p.grad is not None])


def all_reduce_bytes(num_bytes: float, *, num_replicas: int) -> float:
    """Return what one replica sends in a ring all-reduce: a scatter and a gather of all but its own share."""
    return 2 * num_bytes * (num_replicas - 1) / num_replicas


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def mean_of(tensors: Sequence[Tensor], *, group: dist.ProcessGroup | None, num_replicas: int) -> list[Tensor]:
    """Return the means over the replicas of some tensors, as new ones; one collective for each precision.

    One by one they would take a round trip each, 50 tensors on a network of 50 ms more than five seconds.
    """
    means: list[Tensor] = [tensor.detach().clone() for tensor in tensors]
    if num_replicas == 1:
        return means
    for dtype in dict.fromkeys(tensor.dtype for tensor in means):
        places = [index for index, tensor in enumerate(means) if tensor.dtype == dtype]
        vector = torch.cat([means[index].reshape(-1) for index in places])
        dist.all_reduce(vector, group=group)
        vector /= num_replicas
        for index, part in zip(places, torch.split(vector, [means[i].numel() for i in places]), strict=True):
            means[index] = part.view_as(means[index])
    return means
