"""What fits into memory: cutting a micro-batch, and the largest one, found by trying; nothing is trained here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import default_collate

from dptrain.data import micro_batch_sizes
from dptrain.errors import OutOfMemoryError, TaskError
from dptrain.tasks import Batch, Task
from dptrain.tasks.base import split_loss


def split(batch: Batch, parts: int, *, num_samples: int) -> list[Batch]:
    """Cut a collated micro-batch along its first dimension, into that many parts or one for each sample.

    Raises:
        TaskError: where it is not made of tensors with one row for each sample.
    """
    leaves, structure = tree_flatten(batch)
    lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves}
    # Other numbers of rows, such as of the tokens or views of all samples, would be cut within samples.
    if lengths != {num_samples}:
        raise TaskError(
            "a micro-batch that does not fit into memory could not be cut: it must be a tensor, or a tuple, list or "
            "dict of tensors, each with one row for each sample; set a smaller micro_batch_size"
        )
    pieces = zip(*(torch.tensor_split(leaf, min(parts, len(leaf))) for leaf in leaves), strict=True)
    return [tree_unflatten(list(piece), structure) for piece in pieces]


def release_memory(device: torch.device) -> None:
    """Give what torch holds in reserve back to the device: it may be cut up too finely for what is asked of it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def find_micro_batch_size(
    task: Task,
    *,
    smallest: int = 1,
    largest: int,
    device: torch.device,
    num_states: int,
    precision: Callable[[], AbstractContextManager[object]],
) -> int:
    """Return the largest micro-batch size whose forward and backward pass fits into memory on all replicas.

    Tried with the task's first samples, from small to large. Memory that the optimizer will take is held meanwhile.
    Model, gradients and random state stay as they are. A collective.

    Args:
        task: its model is moved to the device.
        smallest: the first size that is tried, in samples.
        largest: the last one.
        device: whose memory it is.
        num_states: tensors of the size of the parameters that the optimizer keeps.
        precision: makes the context of a forward pass.

    Raises:
        OutOfMemoryError: where a single sample does not fit.
    """
    task.model.to(device)
    sizes = micro_batch_sizes(min(largest, len(task.train_data)))  # type: ignore[arg-type]
    tried = [size for size in sizes if size >= smallest]
    with _as_it_was(task.model):
        reserve = [torch.empty_like(p) for _ in range(num_states) for p in task.model.parameters() if p.requires_grad]
        fitting = list(itertools.takewhile(lambda size: _fits(task, size, device=device, precision=precision), tried))
        del reserve
    release_memory(device)
    found = torch.tensor(len(fitting), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    if not found:
        raise OutOfMemoryError(f"the memory of {device} does not suffice for a single sample at a time")
    return tried[int(found) - 1]


def _fits(
    task: Task, num_samples: int, *, device: torch.device, precision: Callable[[], AbstractContextManager[object]]
) -> bool:
    collate = task.collate or default_collate
    batch = collate([task.train_data[index] for index in range(num_samples)])
    try:
        _pass(task, batch, device=device, precision=precision)
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    task.model.zero_grad(set_to_none=True)
    release_memory(device)
    return fits


def _pass(
    task: Task, batch: Batch, *, device: torch.device, precision: Callable[[], AbstractContextManager[object]]
) -> None:
    from accelerate.utils import send_to_device

    with precision():
        loss, _ = split_loss(task.loss(task.model, send_to_device(batch, device)))
    # A second set of gradients, as where one is added to another.
    held = [torch.zeros_like(p) for p in task.model.parameters() if p.requires_grad]
    loss.backward()  # type: ignore[no-untyped-call]
    del held


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Keep buffers, mode and random state from what passes of the model do to them."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        try:
            model.train()
            yield
        finally:
            model.train(was_training)
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
