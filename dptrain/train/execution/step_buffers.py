"""Buffers that are no batch norm's: those of rank 0 before each step, and the same again in a step begun anew."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class StepBuffers:
    """Gives all replicas the buffers of rank 0 before each step, in place of DDP, and puts them back in one begun anew.

    DDP does so in the first forward pass of a step. A replica that begins a step anew for want of memory would do it
    once more, alone, and wait for the others until the collective times out.

    Args:
        model: wrapped. Only in DDP do replicas have the buffers of rank 0.
        ignored: names of buffers that are kept in step by other means.
    """

    def __init__(self, model: nn.Module, *, ignored: Collection[str]) -> None:
        self._ddp = model if isinstance(model, DistributedDataParallel) else None
        self._module: nn.Module = model if self._ddp is None else self._ddp.module
        # Tables that no checkpoint holds are changed by nobody.
        kept = self._module.state_dict().keys() - set(ignored)
        self._names = [name for name, _ in self._module.named_buffers() if name in kept]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def begin_step(self) -> None:
        """Take those of rank 0, and remember them. A collective where there are any; before a step's first pass."""
        if not self._names:
            return
        buffers = self._buffers()
        if self._ddp is not None:
            size = self._ddp.broadcast_bucket_size
            cast("Any", dist)._broadcast_coalesced(self._ddp.process_group, buffers, size, 0)  # noqa: SLF001 - as DDP
        self._before = [buffer.clone() for buffer in buffers]

    @torch.no_grad()
    def discard_step(self) -> None:
        """Go back to those at the beginning of the step."""
        for buffer, before in zip(self._buffers(), self._before, strict=True):
            buffer.copy_(before)

    def _buffers(self) -> list[Tensor]:
        return [self._module.get_buffer(name) for name in self._names]  # by name: a pass may put another one in place
