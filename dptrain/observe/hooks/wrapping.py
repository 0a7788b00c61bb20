"""Finds out how a model's gradients are combined over replicas, and refuses ways in which the meter cannot be right."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dptrain.errors import ObservationError

_REFUSED = {
    "FullyShardedDataParallel": "FSDP1 flattens parameters, and its gradients cannot be seen singly: use fully_shard",
    "DeepSpeedEngine": "DeepSpeed reduces gradients in its own buffers: use DDP or fully_shard",
    "DataParallel": "DataParallel adds up its replicas' gradients inside one backward pass: use "
    "DistributedDataParallel, one process per device",
}


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """How the combined gradient comes about.

    Attributes:
        kind: "none" in one process, "ddp", or "fsdp" for `fully_shard` (FSDP2), HSDP and `replicate()`.
        model: the module without torch.compile round it.
        group: process group over which gradients are averaged; None for the default one.
        num_shards: ranks over which the combined gradient is cut up.
    """

    kind: Literal["none", "ddp", "fsdp"]
    model: nn.Module
    group: dist.ProcessGroup | None = None
    num_shards: int = 1

    @property
    def inner(self) -> nn.Module:
        """The user's own module, whose names and children a user would write."""
        inner = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return getattr(inner, "_orig_mod", inner)


def identify(model: nn.Module) -> Wrapping:
    """Look at `model` and at the process group.

    Raises:
        ObservationError: for a wrapper in which the meter could not be right; the text has the remedy.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for module in model.modules():
        for base in type(module).__mro__:
            if base.__name__ in _REFUSED:
                raise ObservationError(f"cannot measure {type(module).__name__}: {_REFUSED[base.__name__]}")
    # A sharded parameter is known by its mesh: importing DTensor to ask for its type would double the import time.
    sharded = [hasattr(p, "device_mesh") for p in model.parameters() if p.requires_grad]
    if any(sharded):
        return _identify_sharded(model, complete=all(sharded))
    if isinstance(model, DistributedDataParallel):
        return Wrapping(kind="ddp", model=model, group=model.process_group)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ObservationError(
            f"{type(model).__name__} is not wrapped in DistributedDataParallel but the process group has "
            f"{dist.get_world_size()} ranks: attach to the module that DDP or fully_shard returns, after wrapping"
        )
    return Wrapping(kind="none", model=model)


def _identify_sharded(model: nn.Module, *, complete: bool) -> Wrapping:
    managers = _fsdp_modules(model)
    if not managers or isinstance(model, DistributedDataParallel):
        raise ObservationError(
            "the parameters are distributed tensors, but not by fully_shard or replicate() (tensor parallelism): each "
            "rank then has a part of a gradient, which this version does not put together; measure a data-parallel run"
        )
    if not complete:
        raise ObservationError(
            "some trained parameters are sharded and some are not, so nobody reduces the gradients of the latter: "
            "apply fully_shard to the root module too, or freeze them"
        )
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    mesh, placements = parameters[0].device_mesh, parameters[0].placements
    if any(p.device_mesh != mesh for p in parameters):
        raise ObservationError(
            "parameters live on several device meshes (such as expert parallelism), so no one average is the combined "
            "gradient: wrap all of them with one mesh"
        )
    kinds = {tuple(type(placement).__name__ for placement in p.placements) for p in parameters}
    if not kinds <= {("Shard",), ("Replicate",), ("Replicate", "Shard")} or len(kinds) > 1:
        raise ObservationError(
            f"parameters are placed as {sorted(kinds)} on a mesh of shape {tuple(mesh.shape)}: known are fully_shard "
            "on one dimension, on (replicate, shard) for HSDP, and replicate(); tensor parallelism is not supported"
        )
    for module in managers:
        if any(group.gradient_divide_factor is not None for group in _param_groups(module)):
            raise ObservationError(
                "set_gradient_divide_factor was called, so the combined gradient is no mean over the replicas: leave "
                "the factor to FSDP and scale the loss"
            )
    if mesh.size() == dist.get_world_size():
        group = None
    elif mesh.ndim == 1:
        group = mesh.get_group()
    else:
        raise ObservationError(
            f"the mesh of shape {tuple(mesh.shape)} covers {mesh.size()} of {dist.get_world_size()} ranks, and no one "
            "process group holds just these: use a mesh over all ranks"
        )
    sizes = [mesh.size(i) for i, placement in enumerate(placements) if type(placement).__name__ == "Shard"]
    return Wrapping(kind="fsdp", model=model, group=group, num_shards=math.prod(sizes))


def _fsdp_modules(model: nn.Module) -> list[Any]:
    # A module that is wrapped has imported this already; no other should wait for it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _param_groups(module: Any) -> list[Any]:  # noqa: ANN401 - FSDP keeps this to itself
    state = module._get_fsdp_state()  # noqa: SLF001 - the divide factor has a setter but no getter
    groups = getattr(state, "_fsdp_param_groups", None)  # a list from torch 2.12 on
    return [group for group in (groups or [state._fsdp_param_group]) if group is not None]  # noqa: SLF001 - as above
