"""Finds out how a model's gradients are averaged over replicas, and refuses ways in which the meter cannot be right."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dptrain.error_text import shown
from dptrain.errors import ObservationError
from dptrain.observe.loop.sizes import is_count

Reduction = Literal["wrapper", "optimizer"]

_BY_HAND = "compute the squared norms where the engine has the gradients, and hand them to dptrain.Observer"
_REFUSED = {
    "FullyShardedDataParallel": "FSDP1 flattens parameters, and its gradients cannot be seen singly: use fully_shard",
    "DeepSpeedEngine": "DeepSpeed reduces gradients into its own partitions and leaves no .grad: use DDP or "
    f"fully_shard, or {_BY_HAND} (deepspeed.utils.safe_get_full_grad)",
    "DataParallel": "DataParallel adds up its replicas' gradients inside one backward pass: use "
    "DistributedDataParallel, one process per device",
}
_MEGATRON = f"Megatron's wrapper accumulates into main_grad buffers and leaves no .grad: {_BY_HAND} (param.main_grad)"


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """How the averaged gradient comes about.

    Attributes:
        kind: "none" without a wrapper, "ddp", or "fsdp" for `fully_shard` (FSDP2), HSDP and `replicate()`.
        model: the module without torch.compile round it.
        reduction: who averages: the wrapper, or the optimizer inside its step.
        group: process group over which gradients are averaged; None for the default one.
        num_shards: ranks over which the averaged gradient is cut up.
        shard: the number of this rank among them.
        divisor: by what the sum over the replicas is divided; None for their number.
        ranks_per_replica: ranks that hold one copy of the model together by tensor parallelism, or in stages.
        num_stages: pipeline stages, each on ranks of its own.
        num_data_dimensions: of the parameters' mesh, those that replicas are laid out on.
    """

    kind: Literal["none", "ddp", "fsdp"]
    model: nn.Module
    reduction: Reduction = "wrapper"
    group: dist.ProcessGroup | None = None
    num_shards: int = 1
    shard: int = 0
    divisor: float | None = None
    ranks_per_replica: int = 1
    num_data_dimensions: int = 0
    num_stages: int = 1

    @property
    def inner(self) -> nn.Module:
        """The user's own module, whose names and children a user would write."""
        inner = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        return getattr(inner, "_orig_mod", inner)

    def _tensor_placements(self, parameter: Any) -> list[tuple[Any, int]]:  # noqa: ANN401 - a DTensor
        """Return (placement, ranks) of each dimension of the mesh on which one replica is cut up."""
        placements = list(getattr(parameter, "placements", ()))[self.num_data_dimensions :]
        sizes = [parameter.device_mesh.size(self.num_data_dimensions + i) for i in range(len(placements))]
        return list(zip(placements, sizes, strict=True))

    def shares(self, parameters: Sequence[nn.Parameter]) -> tuple[float, ...]:
        """Return by what each parameter's square is multiplied, so that a replica's ranks add up to its square."""
        if self.ranks_per_replica == self.num_stages:  # no parameter is on two ranks of a replica
            return ()
        cuts = [[size for placement, size in self._tensor_placements(p) if placement.is_shard()] for p in parameters]
        return tuple(math.prod(sizes) / self.ranks_per_replica for sizes in cuts)

    def cut_by_rows(self, parameter: nn.Parameter) -> bool:
        """Say whether the data-parallel shards of a parameter are pieces of its first dimension, or it has none."""
        placements = list(getattr(parameter, "placements", ()))[: self.num_data_dimensions]
        return all(not p.is_shard() or p.dim == 0 for p in placements)

    def num_rows(self, parameter: nn.Parameter) -> int:
        """Return the rows of a parameter that one replica's rank has before data parallelism cuts them."""
        if parameter.dim() == 0:
            return 1
        cuts = [size for placement, size in self._tensor_placements(parameter) if placement.is_shard(0)]
        return -(-parameter.shape[0] // math.prod(cuts))


_without_noise_scale: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def refuse_measuring(model: nn.Module, reason: str) -> None:
    """Have `identify` refuse a module from now on, because of what its replicas exchange."""
    _without_noise_scale[model] = reason


def identify(model: nn.Module, *, reduction: Reduction = "wrapper") -> Wrapping:
    """Look at `model` and at the process group.

    Raises:
        ObservationError: for a wrapper in which the meter could not be right; the text has the remedy.
    """
    if reduction not in ("wrapper", "optimizer"):
        raise ObservationError(f"reduction must be 'wrapper' or 'optimizer', got {reduction!r}")
    model = getattr(model, "_forward_module", model)  # what Lightning Fabric wraps
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    if isinstance(model, torch.jit.ScriptModule):
        raise ObservationError(
            f"{type(model).__name__} takes no hooks on its forward pass: attach to the module before torch.jit.script, "
            "or use torch.compile"
        )
    if model in _without_noise_scale:
        raise ObservationError(f"there is no noise scale here: {_without_noise_scale[model]}")
    for module in model.modules():
        _refuse_engines(module)
    refuse_context_parallelism(model)
    _refuse_devices(model)
    # A sharded parameter is known by its mesh: importing DTensor to ask for its type would double the import time.
    sharded = [hasattr(p, "device_mesh") for p in model.parameters() if p.requires_grad]
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if reduction == "optimizer":
        if any(sharded) or isinstance(model, DistributedDataParallel):
            raise ObservationError(
                "reduction='optimizer' is for a bare model whose .grad stays the rank's own until the optimizer steps, "
                f"but {type(model).__name__} averages gradients itself: leave `reduction` out"
            )
        return Wrapping(kind="none", model=model, reduction=reduction)
    if any(sharded):
        return _identify_sharded(model, complete=all(sharded))
    if isinstance(model, DistributedDataParallel):
        return Wrapping(kind="ddp", model=model, group=model.process_group)
    if ranks > 1:
        raise ObservationError(
            f"{type(model).__name__} is not wrapped in DistributedDataParallel but the process group has {ranks} "
            "ranks: attach to the module that DDP or fully_shard returns, after wrapping; where the optimizer averages "
            "the gradients in its step, attach with reduction='optimizer'"
        )
    return Wrapping(kind="none", model=model)


def over_stages(wrapping: Wrapping, *, num_stages: int) -> Wrapping:
    """Return the same for a model whose stages are added up over all ranks.

    Args:
        wrapping: of one stage.
        num_stages: ranks that hold one copy of the model together.

    Raises:
        ObservationError: where that is no such number, or the stage is not averaged over the ranks that hold it.
    """
    if not is_count(num_stages):
        raise ObservationError(f"num_stages must be a number of pipeline stages, at least 1, got {shown(num_stages)}")
    if num_stages == 1:
        return wrapping
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if wrapping.kind != "ddp" or dist.get_world_size(wrapping.group) * num_stages != ranks:
        raise ObservationError(
            f"num_stages={num_stages} is for a stage in DistributedDataParallel(stage, process_group=…) over the ranks "
            f"that hold the same stage, {ranks} ranks over {num_stages} stages: attach to that module"
        )
    return replace(wrapping, group=None, ranks_per_replica=num_stages, num_stages=num_stages)


def _refuse_engines(module: nn.Module) -> None:
    for base in type(module).__mro__:
        if base.__name__ in _REFUSED:
            raise ObservationError(f"cannot measure {type(module).__name__}: {_REFUSED[base.__name__]}")
        if base.__module__.startswith("megatron.") and base.__name__.startswith("DistributedDataParallel"):
            raise ObservationError(f"cannot measure {type(module).__name__}: {_MEGATRON}")
    if getattr(module, "share", None) is not None and hasattr(module, "share_out"):
        raise ObservationError(
            f"cannot measure {type(module).__name__}: its experts are shared out over replicas, so that a gradient of "
            "theirs holds the samples of several: leave expert parallelism out, or train by dptrain.Trainer with "
            "execution.expert_parallel_size, which measures it"
        )
    if any(hasattr(p, "main_grad") for p in module.parameters(recurse=False)):
        raise ObservationError(f"cannot measure {type(module).__name__}: {_MEGATRON}")


def _identify_sharded(model: nn.Module, *, complete: bool) -> Wrapping:
    managers = _fsdp_modules(model)
    if not managers or isinstance(model, DistributedDataParallel):
        raise ObservationError(
            "the parameters are distributed tensors, but not by fully_shard or replicate() (tensor parallelism alone): "
            "without replicas there is no data-parallel dimension to compare over; apply fully_shard on one, of size 1 "
            "or more"
        )
    if not complete:
        raise ObservationError(
            "some trained parameters are sharded and some are not, so nobody reduces the gradients of the latter: "
            "apply fully_shard to the root module too, or freeze them"
        )
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    data_mesh, shard, num_shards = _data_mesh(managers)
    num_data_dimensions = data_mesh.ndim
    _refuse_meshes(parameters, data_mesh)
    kinds = {
        tuple(type(p).__name__.removeprefix("_Strided") for p in q.placements[:num_data_dimensions]) for q in parameters
    }
    known = {("Shard",), ("Replicate",), ("Replicate", "Shard")}
    tensor_kinds = {type(p).__name__ for q in parameters for p in q.placements[num_data_dimensions:]}
    if not kinds <= known or len(kinds) > 1 or not tensor_kinds <= {"Shard", "Replicate"}:
        raise ObservationError(
            f"parameters are placed as {sorted(kinds)} on a mesh of shape {tuple(data_mesh.shape)}: known are "
            "fully_shard on one dimension, on (replicate, shard) for HSDP, and replicate(), with tensor parallelism "
            "inside"
        )
    ranks = dist.get_world_size()
    ranks_per_replica = max(p.device_mesh.size() for p in parameters) // data_mesh.size()
    group = None
    if data_mesh.size() * ranks_per_replica != ranks:
        if data_mesh.ndim > 1 or ranks_per_replica > 1:
            raise ObservationError(
                f"the mesh of shape {tuple(data_mesh.shape)} covers {data_mesh.size() * ranks_per_replica} of {ranks} "
                "ranks, and no one process group holds just these: use a mesh over all ranks"
            )
        group = data_mesh.get_group()
    return Wrapping(
        kind="fsdp",
        model=model,
        group=group,
        num_shards=num_shards,
        shard=shard,
        divisor=_divide_factor(managers),
        ranks_per_replica=ranks_per_replica,
        num_data_dimensions=num_data_dimensions,
    )


def _data_mesh(managers: list[Any]) -> tuple[Any, int, int]:
    """Return the mesh that gradients are averaged over, this rank's number among the shards, and their count."""
    infos = [group.mesh_info for module in managers for group in _param_groups(module)]
    meshes = [info.mesh for info in infos]
    if any(mesh != meshes[0] for mesh in meshes):
        raise ObservationError(
            "parameters live on several device meshes (such as expert parallelism), so no one average is the averaged "
            "gradient of all: wrap all of them with one mesh; on an expert-parallel mesh an expert's gradient holds "
            "the tokens of its whole group"
        )
    if _has_context_dimension(meshes[0]):
        raise ObservationError(_CONTEXT.format(f"the mesh dimension {meshes[0].mesh_dim_names}"))
    number, count = getattr(infos[0], "shard_mesh_rank", 0), getattr(infos[0], "shard_mesh_size", 1)
    return meshes[0], number, count


_CONTEXT = (
    "{} contains context parallelism, where a rank's gradient is that of a part of each sequence and no sample's: "
    "measure without context parallelism"
)


def _has_context_dimension(mesh: Any) -> bool:  # noqa: ANN401 - a DeviceMesh
    """Say whether sequences are cut up over a dimension of the mesh that a mesh was sliced and flattened from."""
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh  # noqa: SLF001 - no public form
    sizes = dict(zip(root.mesh_dim_names or (), root.shape, strict=False))
    known = [size for name, size in sizes.items() if name.lower() in ("cp", "context", "context_parallel")]
    if known or root != mesh:
        return any(size > 1 for size in known)  # a flattened mesh is called "dp_shard_cp" without any context, too
    parts = "_".join(mesh.mesh_dim_names or ()).lower().split("_")
    return "cp" in parts or "context" in parts


def refuse_context_parallelism(model: nn.Module) -> None:
    """Raise inside of torch's context parallelism, whatever the mesh is called that gradients are averaged over.

    Torchtitan's mesh for `fully_shard` is one dimension "fsdp", with and without it. What is asked is torch's own: the
    attention function that it has replaced, and the hooks that it has put on attention modules.

    Raises:
        ObservationError: with the remedy.
    """
    attention = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    if attention is None:
        return
    present = torch.nn.functional.scaled_dot_product_attention
    meshes = []
    if present in getattr(attention, "_replaced_functions", ()):
        meshes += [cell.cell_contents for cell in getattr(present, "__closure__", None) or ()]
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001 - no public form
            style = getattr(getattr(hook, "func", None), "__self__", None)
            if type(style).__name__ == "_ContextParallel":
                meshes.append(getattr(hook, "keywords", {}).get("mesh"))
    if any(hasattr(mesh, "mesh_dim_names") and mesh.size() > 1 for mesh in meshes):
        raise ObservationError(_CONTEXT.format("the forward pass"))


def _refuse_devices(model: nn.Module) -> None:
    """Raise where gradients are on several devices, or elsewhere than what is computed from them."""
    devices = sorted({str(p.device) for p in model.parameters() if p.requires_grad})
    if len(devices) > 1:
        raise ObservationError(
            f"trained parameters are on several devices ({', '.join(devices)}), whose norms nobody adds up: measure a "
            "model that is on one device in each process, such as one sharded by fully_shard"
        )
    policies = [getattr(group, "offload_policy", None) for m in _fsdp_modules(model) for group in _param_groups(m)]
    if any(type(policy).__name__ == "CPUOffloadPolicy" for policy in policies):
        raise ObservationError(
            "fully_shard offloads the averaged gradient to the host (CPUOffloadPolicy), away from the gradients that "
            "it is compared with: leave offload_policy out"
        )


def _refuse_meshes(parameters: list[Any], data_mesh: Any) -> None:  # noqa: ANN401 - a DeviceMesh
    """Raise where parameters are cut up over ranks other than those of one replica."""
    meshes = {p.device_mesh for p in parameters}
    larger = [mesh for mesh in meshes if mesh.size() > data_mesh.size()]
    if len(larger) > 1 or any(mesh.ndim < data_mesh.ndim for mesh in meshes):
        raise ObservationError(
            "parameters live on several device meshes (such as expert parallelism), so no one average is the averaged "
            "gradient: wrap all of them with one mesh"
        )


def _divide_factor(managers: list[Any]) -> float | None:
    factors = {group.gradient_divide_factor for module in managers for group in _param_groups(module)}
    if len(factors) > 1:
        raise ObservationError(
            f"set_gradient_divide_factor gave the modules different factors ({sorted(map(str, factors))}), so the "
            "averaged gradient is no mean over the replicas: use one factor for all"
        )
    return factors.pop() if factors else None


def reduction_formats(model: nn.Module) -> set[torch.dtype]:
    """Return the formats that a wrapper is set to reduce gradients in; none where it takes those of the gradients."""
    if isinstance(model, DistributedDataParallel):
        policies = [getattr(model, "mixed_precision", None)]
    else:
        groups = [group for module in _fsdp_modules(model) for group in _param_groups(module)]
        policies = [getattr(group, "mp_policy", None) for group in groups]
    return {policy.reduce_dtype for policy in policies if policy is not None and policy.reduce_dtype is not None}


def _fsdp_modules(model: nn.Module) -> list[Any]:
    # A module that is wrapped has imported this already; no other should wait for it.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def _param_groups(module: Any) -> list[Any]:  # noqa: ANN401 - FSDP keeps this to itself
    state = module._get_fsdp_state()  # noqa: SLF001 - the divide factor has a setter but no getter
    groups = getattr(state, "_fsdp_param_groups", None)  # a list from torch 2.12 on
    return [group for group in (groups or [state._fsdp_param_group]) if group is not None]  # noqa: SLF001 - as above
