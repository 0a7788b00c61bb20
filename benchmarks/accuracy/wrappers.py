"""A model in each wrapper, and what the wrapper's own documentation asks of the loop; nothing is measured here."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.accuracy.problems import Mixture

BEST_COMPILER = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
"""Backend of torch.compile; inductor's code for a CPU needs a compiler of C++."""

Method = Literal["auto", "parameters", "hook"]


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A wrapped model and what its loop does beside it.

    Attributes:
        model: what the loop calls, and what a meter is attached to.
        waits: context of all backward passes of a step but the last.
        backward: of a loss.
        dtype: of autocast, where there is one.
    """

    model: nn.Module
    waits: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    backward: Callable[[Tensor], object] = torch.autograd.backward
    dtype: torch.dtype | None = None

    def accumulate(self, samples: tuple[Tensor, ...], *, share: float, last: bool) -> None:
        """Run one micro-batch.

        Args:
            samples: one tensor for each part of the model.
            share: factor on the mean loss, 1/accumulation_steps where all micro-batches are alike.
            last: whether it is the last one of its step.
        """
        with contextlib.nullcontext() if last else self.waits():
            with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not None):
                loss = self.model(*samples).mean() * share
            self.backward(loss)


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A way to train.

    Attributes:
        name: as the result names it.
        wrap: model → loop.
        world_size: replicas.
        accumulation_steps: micro-batches of each.
        methods: of `attach`, one meter each on the same gradients.
        geometry: of `attach`; "adam" with an optimizer whose second moments are fixed.
    """

    name: str
    wrap: Callable[[Mixture], Loop]
    world_size: int = 2
    accumulation_steps: int = 2
    methods: tuple[Method, ...] = ("auto",)
    geometry: Literal["sgd", "adam"] = "sgd"


def alone(model: Mixture) -> Loop:
    """One process."""
    return Loop(model=model)


def ddp(model: Mixture) -> Loop:
    """DDP, synchronised once per step."""
    wrapped = DistributedDataParallel(model)
    return Loop(model=wrapped, waits=wrapped.no_sync)


def ddp_in_bf16(model: Mixture) -> Loop:
    """DDP under autocast."""
    wrapped = DistributedDataParallel(model)
    return Loop(model=wrapped, waits=wrapped.no_sync, dtype=torch.bfloat16)


def ddp_with_checkpoints(model: Mixture) -> Loop:
    """DDP round parts whose activations are computed again in the backward pass."""
    model.parts = nn.ModuleList(_Checkpointed(part) for part in model.parts)
    return ddp(model)


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, samples: Tensor) -> Tensor:
        losses: Tensor = checkpoint(self.inner, samples, use_reentrant=False)
        return losses


def compiled_ddp(model: Mixture, *, backend: str) -> Loop:
    """torch.compile of the whole module that DDP returns."""
    wrapped = DistributedDataParallel(model)
    # One compiling process, not a pool of its own for each replica.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    compiled: Any = torch.compile(wrapped, backend=backend)
    return Loop(model=compiled, waits=wrapped.no_sync)


def accelerated_ddp(model: Mixture) -> Loop:
    """What `accelerator.prepare` makes of a model, with its own backward pass."""
    from accelerate import Accelerator

    # What torchrun would have set.
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, LOCAL_WORLD_SIZE=world_size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    accelerator = Accelerator(cpu=True)
    prepared: nn.Module = accelerator.prepare(model)
    return Loop(model=prepared, waits=lambda: accelerator.no_sync(prepared), backward=accelerator.backward)


def sharded(model: Mixture) -> Loop:
    """FSDP2: `fully_shard` of each part and of the whole, on a mesh of one dimension."""
    return _fully_sharded(model, mesh_shape=(dist.get_world_size(),))


def hybrid(model: Mixture) -> Loop:
    """HSDP: the same on a mesh of two replicas in shards."""
    return _fully_sharded(model, mesh_shape=(2, dist.get_world_size() // 2))


def _fully_sharded(model: Mixture, *, mesh_shape: tuple[int, ...]) -> Loop:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    return _composed(model, lambda module: fully_shard(module, mesh=mesh))


def replicated(model: Mixture) -> Loop:
    """`replicate()` of torch's FSDP2, of each part and of the whole."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return _composed(model, replicate)


def _composed(model: Mixture, wrap: Callable[[nn.Module], Any]) -> Loop:
    for part in model.parts:
        wrap(part)
    whole: Any = wrap(model)

    @contextlib.contextmanager
    def waits() -> Iterator[None]:
        whole.set_requires_gradient_sync(False)
        yield
        whole.set_requires_gradient_sync(True)

    return Loop(model=whole, waits=waits)


ONE_PROCESS = Wrapper(name="one process", wrap=alone, world_size=1, accumulation_steps=4)
DDP = Wrapper(name="DDP", wrap=ddp, methods=("parameters", "hook"))


def wrappers(*, compiler: str | None) -> list[Wrapper]:
    """Return all of them, with this backend of torch.compile; with None all but the compiled one."""
    compiled = [
        Wrapper(name=f"DDP, compiled ({backend})", wrap=functools.partial(compiled_ddp, backend=backend))
        for backend in [compiler]
        if backend is not None
    ]
    return [
        ONE_PROCESS,
        DDP,
        Wrapper(name="DDP, autocast bf16", wrap=ddp_in_bf16),
        Wrapper(name="DDP, checkpointing", wrap=ddp_with_checkpoints),
        *compiled,
        Wrapper(name="DDP by accelerate", wrap=accelerated_ddp),
        Wrapper(name="DDP, Adam's geometry", wrap=ddp, geometry="adam"),
        Wrapper(name="fully_shard", wrap=sharded),
        Wrapper(name="replicate", wrap=replicated),
        Wrapper(name="HSDP 2×2", wrap=hybrid, world_size=4, accumulation_steps=1),
    ]
