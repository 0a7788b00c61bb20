"""Micro-batches brought to the device while it computes."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils._pytree import tree_map

from dptrain.tasks.base import Batch


class DeviceCopy:
    """Copies micro-batches in a CUDA stream of its own, so that a copy does not queue up behind the step under way.

    The host is ahead of the device by up to a step: the copy begins at once, where in the stream of the step it would
    begin after all that is queued. On a CPU batches pass through.

    Args:
        device: of this replica.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch on the device; the present stream waits for it, the host does not."""
        if self._device.type == "cpu":
            return batch
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            moved = tree_map(lambda leaf: leaf.to(self._device, non_blocking=True) if _is_tensor(leaf) else leaf, batch)
        if self._stream is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_stream(self._stream)
            # Else the memory could be given away while the present stream still reads it.
            tree_map(lambda leaf: leaf.record_stream(present) if _is_tensor(leaf) else None, moved)
        # What is no container of torch's, such as a BatchEncoding or a graph, in the present stream: nobody knows which
        # tensors of it there are to be recorded.
        return tree_map(lambda leaf: leaf if _is_tensor(leaf) else send_to_device(leaf, self._device), moved)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)
