"""A process group of any size with one process in it: torch's fake group, in which the others do what this one does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def pretended_replicas(world_size: int) -> Iterator[None]:
    """Be rank 0 of so many replicas, of which the others do not exist.

    Nothing is communicated: a sum is this rank's value times the number of ranks, and what is gathered from the shards
    of others is whatever memory holds. Shapes, layout, memory and the time of this rank's own work are those of such a
    run; losses and gradients are not.

    Args:
        world_size: number of replicas.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend; torch has no other place

    one_host = {"LOCAL_WORLD_SIZE": str(world_size)}
    before = {name: os.environ.get(name) for name in one_host}
    os.environ |= one_host
    all_reduce = dist.all_reduce
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())

    def multiplied(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:  # noqa: ANN401, FBT001, FBT002 - torch's own signature
        work = all_reduce(tensor, op=op, group=group, async_op=async_op)
        if op == dist.ReduceOp.SUM:
            tensor.mul_(dist.get_world_size(group))
        return work

    dist.all_reduce = multiplied
    try:
        yield
    finally:
        dist.all_reduce = all_reduce
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        dist.destroy_process_group()


def answer_for_others(model: nn.Module) -> None:
    """Have DDP take this rank's gradient for the mean: its reducer does not take the fake group's answer."""
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, lambda _state, bucket: _completed(bucket.buffer()))


def _completed(gradient: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(gradient)
    return future
