"""Running statistics of batch norms: the same on every number of replicas, and on each of them after every step.

A batch norm moves its statistics r by each micro-batch's x: r ← (1 − m)·r + m·x. On one replica all K micro-batches of
a step do so in turn. That is linear in the x, so replicas can share the work: rank 0 begins with r and the others with
zero, each moves by its own micro-batches and decays by (1 − m) for each micro-batch of another, and the sum over the
replicas is what one replica would have found. DDP by itself keeps rank 0's and forgets what the others saw.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from dptrain.errors import TaskError

_COUNTER = "num_batches_tracked"


class RunningStatistics:
    """Keeps the running statistics of a model's batch norms in step; does nothing for a model without any.

    A module that is called twice in one forward pass decays once more for each call on its own replica, so for such
    modules the statistics depend a little on the number of replicas. `SyncBatchNorm` is left alone: it has the same
    statistics everywhere.

    Args:
        model: not wrapped.
        rank: of this replica.
        world_size: number of replicas.
        fewest_samples: that the loss takes at a time.

    Raises:
        TaskError: where a module averages over all micro-batches (momentum=None) and there are several replicas.
    """

    def __init__(self, model: nn.Module, *, rank: int, world_size: int, fewest_samples: int = 1) -> None:
        self._rank = rank
        self._world_size = world_size
        self._modules = {name: module for name, module in model.named_modules() if _is_tracked(module)}
        for name, module in self._modules.items():
            if module.momentum is None and world_size > 1:
                raise TaskError(f"{name} has momentum=None, whose average replicas cannot share: set one, such as 0.1")
        has_batch_norms = any(isinstance(module, _BatchNorm) for module in model.modules())
        self._smallest = max(fewest_samples, 2 if has_batch_norms else 1)
        self._momenta = {name: module.momentum for name, module in self._modules.items()}
        self._active: dict[str, _NormBase] = {}
        self._before: list[Tensor] = []
        self._last = -1
        self._is_filler = False

    def __bool__(self) -> bool:
        """Whether the model has any."""
        return bool(self._modules)

    @property
    def smallest_micro_batch(self) -> int:
        """The fewest samples in a forward pass: a batch norm has nothing to divide a single one by."""
        return self._smallest

    def buffer_names(self) -> list[str]:
        """Return the names of the buffers that are kept in step, which DDP must not copy from rank 0."""
        return [f"{name}.{key}" for name, module in self._modules.items() for key, _ in module.named_buffers()]

    def begin_step(self) -> None:
        """Note the statistics before a step; ranks but 0 begin from zero."""
        # A module in eval mode while others train is frozen, and its statistics are in use.
        self._active = {name: module for name, module in self._modules.items() if module.training}
        self._before = [buffer.clone() for buffer in self._buffers()]
        self._begin()

    def begin_micro_batch(self, number: int | None) -> None:
        """Prepare for a forward pass.

        Args:
            number: of the micro-batch within the step, from 0, counted over all replicas; None for a filler, whose
                samples belong to another step.
        """
        self._end_filler()
        if number is None:
            self._is_filler = True
            for module in self._active.values():
                module.momentum = 0.0
            return
        # One decay is the kernel's own. Parts of a micro-batch, cut for want of memory, have the same number.
        self._decay(max(0, number - self._last - 1))
        self._last = number

    def end_step(self, *, num_micro_batches: int, finite: Tensor) -> None:
        """Combine the replicas' statistics. A collective; waits for no device.

        Args:
            num_micro_batches: of the step, over all replicas.
            finite: whether the step is taken, a scalar on the device; else the statistics are those before it.
        """
        self._end_filler()
        self._decay(num_micro_batches - 1 - self._last)
        buffers = self._buffers()
        if self._world_size > 1 and buffers:
            _sum_over_replicas(buffers)
        for buffer, before in zip(buffers, self._before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        self._before = []

    def discard_step(self) -> None:
        """Begin the step anew, with the statistics before it; ranks but 0 from zero again."""
        self._end_filler()
        for buffer, before in zip(self._buffers(), self._before, strict=True):
            buffer.copy_(before)
        self._begin()

    def _begin(self) -> None:
        self._last = -1
        if self._rank != 0:
            for buffer in self._buffers():
                buffer.zero_()

    def _decay(self, num_others: int) -> None:
        if num_others == 0:
            return
        for module in self._active.values():
            for key, buffer in module.named_buffers(recurse=False):
                if key != _COUNTER:
                    buffer.mul_((1 - (module.momentum or 0.0)) ** num_others)

    def _end_filler(self) -> None:
        if not self._is_filler:
            return
        self._is_filler = False
        for name, module in self._active.items():
            module.momentum = self._momenta[name]
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.sub_(1)

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self._active.values() for _, buffer in module.named_buffers(recurse=False)]


def _is_tracked(module: nn.Module) -> bool:
    return (
        isinstance(module, _NormBase) and module.running_mean is not None and not isinstance(module, nn.SyncBatchNorm)
    )


def _sum_over_replicas(buffers: list[Tensor]) -> None:
    """Sum in place, in one collective; in float64, which holds counters and float32 exactly."""
    flat = torch.cat([buffer.double().flatten() for buffer in buffers])
    dist.all_reduce(flat)
    for buffer, part in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
