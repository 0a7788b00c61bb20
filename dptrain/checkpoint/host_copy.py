"""A copy of tensors on the host, in memory that is kept from one copy to the next; nothing is written here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class HostCopy:
    """Buffers that take the values of tensors, so that training may go on while the values are written.

    New memory costs about four times what the copy itself does, so the buffers stay; they are made anew only for
    tensors whose shape or dtype has changed. They take as many bytes of host memory as the tensors have, pinned where
    the tensors are on a GPU.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, dict[str, Tensor]] = {}

    def take(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copy tensors and wait until the copy is whole: this is the stall that a save costs the training loop.

        Args:
            tensors: group → key → tensor, on any device.

        Returns:
            The same names with contiguous host tensors that share no memory. They hold until the next call.
        """
        before = self._buffers
        self._buffers = {
            name: {key: _fitting(before.get(name, {}).get(key), like=tensor) for key, tensor in group.items()}
            for name, group in tensors.items()
        }
        for name, group in tensors.items():
            for key, tensor in group.items():
                self._buffers[name][key].copy_(tensor.detach(), non_blocking=True)
        # Synchronises each device once, instead of once per tensor.
        for device in {tensor.device for group in tensors.values() for tensor in group.values()}:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return self._buffers


def _fitting(buffer: Tensor | None, *, like: Tensor) -> Tensor:
    if buffer is not None and buffer.shape == like.shape and buffer.dtype == like.dtype:
        return buffer
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)
