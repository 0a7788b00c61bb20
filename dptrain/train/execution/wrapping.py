"""A bare model made ready for data parallelism: on its device, checkpointed, compiled and wrapped, in this order."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dptrain.config.execution import ExecutionConfig
from dptrain.cost.flops import is_counting, recomputation
from dptrain.errors import ConfigError
from dptrain.exchange import Exchange
from dptrain.models.expert_parallel import expert_shares
from dptrain.models.float8 import use_float8

_COMPILED_SHAPES = 64
"""Graphs that dynamo may keep for one function. Its own limit of 8 is below the number of micro-batch sizes;
past it a function runs uncompiled for good, with a line in the log."""


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a model: of all lists of modules of one class, those with the most parameters.

    Where a model has no such list, its children that have parameters.
    """
    best: list[nn.Module] = []
    most = 0
    for module in model.modules():
        children = list(module.children())
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1
        if is_list and len({type(child) for child in children}) == 1:
            size = sum(p.numel() for p in module.parameters())
            if size > most:
                best, most = children, size
    return best or [child for child in model.children() if next(child.parameters(), None) is not None]


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the type that forward passes run in, or None for that of the parameters."""
    half = dict.fromkeys(("bf16", "bf16_parameters", "fp8"), torch.bfloat16)
    return {**half, "fp16": torch.float16}.get(precision)


def autocast(device: torch.device, *, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Return the context of a forward pass."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def forward_precision(
    model: nn.Module, *, device: torch.device, precision: str
) -> Callable[[], AbstractContextManager[object]]:
    """Return what makes the context of a forward pass of a wrapped model, by the settings' precision."""
    # FSDP casts parameters itself, once for all passes of a step.
    dtype = None if is_distributed(model) else autocast_dtype(precision)
    return functools.partial(autocast, device, dtype=dtype)


def wrap(
    model: nn.Module,
    *,
    exchange: Exchange,
    execution: ExecutionConfig,
    precision: str,
    device: torch.device,
    find_unused_parameters: bool = False,
) -> nn.Module:
    """Return what the loss is called with; the bare model is changed in place and keeps its names.

    Written out instead of `Accelerator.prepare`, which refuses float16 on a CPU, casts the outputs of every forward
    pass, and for FSDP2 makes the parameters anew and wants the optimizer with them.

    Args:
        model: on any device.
        exchange: what replicas send one another; wraps a model that is not sharded.
        execution: how steps run.
        precision: of the settings.
        device: of this replica.
        find_unused_parameters: whether DDP looks for them in each step.

    Raises:
        ConfigError: where the replicas do not make up the shards, or fp8 cannot be had.
    """
    if execution.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.fp32_precision = "tf32"
    model.to(device)
    if precision == "fp8":
        use_float8(model, device=device)
    blocks = find_blocks(model)
    if execution.activation_checkpointing == "blocks":
        for block in blocks:
            _checkpointed(block)
    if execution.compile != "off":
        _compile(model, blocks, execution=execution)
    if execution.wrapper == "ddp":
        return exchange.wrap(
            model,
            ignored_buffers=list(dict(model.named_buffers())),  # `StepBuffers` and `RunningStatistics` share them
            device_ids=[device] if device.type == "cuda" else None,
            # Not static_graph: with it the first pass under no_sync ends in an internal error of torch 2.13's reducer.
            find_unused_parameters=find_unused_parameters,
        )
    if not dist.is_initialized():
        return model
    return _sharded(model, blocks, execution=execution, precision=precision, device=device)


def _checkpointed(block: nn.Module) -> None:
    # On the instance and not around it: the names of parameters stay as they are.
    block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a module takes
    # The contexts only where they are needed: compiled code takes any such for a choice of what is kept.
    if is_counting():
        return checkpoint(forward, *args, use_reentrant=False, context_fn=recomputation, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _compile(model: nn.Module, blocks: list[nn.Module], *, execution: ExecutionConfig) -> None:
    import torch._dynamo

    config: Any = torch._dynamo.config  # noqa: SLF001 - the module that torch documents
    config.recompile_limit = max(config.recompile_limit, _COMPILED_SHAPES)
    for module in [model] if execution.compile == "model" else blocks:
        # Not dynamic: a batch dimension of unknown size costs speed in every step, and there are few sizes.
        settings: dict[str, Any] = {"backend": execution.compile_backend, "dynamic": False}
        if type(module).__module__.startswith("torch."):
            # Dynamo passes over functions of torch's own files, and leaves such a module uncompiled without a word.
            module.forward = _CompiledForward(module.forward, **settings)
        else:
            module.compile(**settings)


class _CompiledForward:
    """The forward function of a module of torch's own, compiled; a copy of the module runs its own one uncompiled.

    A plain function on the module would be shared by its copies, which would compute with the parameters of the first:
    `copy.deepcopy` takes functions as they are. It does the same to what `module.compile()` sets: a copy is uncompiled.

    Args:
        forward: of the module, bound to it.
        settings: of `torch.compile`.
    """

    def __init__(self, forward: Callable[..., Any], **settings: Any) -> None:  # noqa: ANN401 - of torch.compile
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a module takes
            return forward(*args, **kwargs)

        self._forward = forward
        self._compiled = torch.compile(call, **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever a module takes
        return self._compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        copied: Callable[..., Any] = copy.deepcopy(self._forward, memo)
        return copied


def _sharded(
    model: nn.Module, blocks: list[nn.Module], *, execution: ExecutionConfig, precision: str, device: torch.device
) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape, names = mesh_shape(execution, world_size=dist.get_world_size())
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Sums in float32 whatever the parameters are gathered in: the noise scale and the update need them.
    policy = MixedPrecisionPolicy(
        param_dtype=autocast_dtype(precision),
        reduce_dtype=torch.float32,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return cast("nn.Module", fully_shard(model, mesh=mesh, mp_policy=policy))


def mesh_shape(execution: ExecutionConfig, *, world_size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the shape of the mesh of replicas and the names of its dimensions.

    Raises:
        ConfigError: where the replicas do not make up the shards.
    """
    if execution.wrapper == "fsdp":
        return (world_size,), ("shard",)
    size = execution.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % size:
        raise ConfigError(f"execution.shard_size {size} does not divide {world_size} replicas")
    return (world_size // size, size), ("replicate", "shard")


def defer_combining(model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Return the context of a forward and backward pass: gradients are combined after the last one of a step alone."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if is_last else model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        cast("Any", model).set_requires_gradient_sync(is_last)
    return nullcontext()


def is_distributed(model: nn.Module) -> bool:
    """Whether the parameters are distributed tensors, as FSDP makes them."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are cut up over the replicas, so that each forward pass takes several of them."""
    return is_distributed(model) or bool(expert_shares(model))


def num_shards(model: nn.Module) -> int:
    """Return over how many replicas each parameter is cut up."""
    sharded: Any = next((p for p in model.parameters() if hasattr(p, "full_tensor")), None)
    if sharded is None:
        return 1
    sizes = [
        sharded.device_mesh.size(index)
        for index, placement in enumerate(sharded.placements)
        if type(placement).__name__ == "Shard"
    ]
    return math.prod(sizes)
