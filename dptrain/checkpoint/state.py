"""Between a live model or optimizer and the tensors and JSON of a checkpoint; no file is touched here.

What is packed shares memory with the live object where it can: copy it before the next step if it is written later.

Parameters sharded by `fully_shard` are packed as they are (`gather=False`), for `shards.py` to write a file per rank,
or whole: then packing is a collective, every rank calls it, one tensor after the other is gathered, and rank 0 alone
keeps it, in host memory. Either way a checkpoint fits any number of ranks, and the same model without sharding.
Unpacking is no collective: each rank takes its shard of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.errors import CheckpointError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from torch.optim import Optimizer

    from dptrain.checkpoint.manifest import JSON

_MAX_DIFFERENCES = 20

Placed = Callable[[str, Tensor], Tensor]
"""(name of a parameter, itself or state of it) → the same memory as a distributed tensor, where this rank has a part of
it in a plain tensor; else the tensor as it is."""


def _whole(name: str, tensor: Tensor) -> Tensor:  # noqa: ARG001 - the form of `Placed`
    return tensor


def pack_model(model: nn.Module, *, gather: bool = True, placed: Placed = _whole) -> dict[str, Tensor]:
    """Return the model's state dict, buffers included, in tensors that share no memory with one another.

    Tied weights (names of one and the same tensor) stand under their first name only. Views that overlap otherwise
    are written each in full. On ranks other than 0, sharded entries are left out.

    Args:
        model: not wrapped.
        gather: whether sharded entries are put together on rank 0, a collective; else they stay as they are.
        placed: says which plain tensors are parts.

    Raises:
        CheckpointError: where an entry is not a dense tensor.
    """
    live, first_names = _entries(model, placed)
    return _packed({name: live[name] for name in dict.fromkeys(first_names.values())}, gather=gather)


def unpack_model(model: nn.Module, tensors: Mapping[str, Tensor], *, placed: Placed = _whole) -> None:
    """Load what `pack_model` gave, bit for bit, into a model of the same structure; tied weights stay tied.

    Args:
        model: not wrapped.
        tensors: whole.
        placed: as for `pack_model`.

    Raises:
        CheckpointError: where names, shapes or dtypes differ; the text lists the differences, and the model is as it
            was.
    """
    live, first_names = _entries(model, placed)
    wanted = {name: _form(live[name].shape, live[name].dtype) for name in first_names.values()}
    saved = {name: _form(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    _refuse("model", list(_differences(live=wanted, saved=saved)))
    for name in dict.fromkeys(first_names.values()):
        if is_sharded(live[name]):
            _copy_shard(live[name], whole=tensors[name])
    # Under every name, not the first alone: a module may react to its own keys, and copying a tied weight twice
    # changes nothing, nor does copying a shard onto itself.
    own = model.state_dict()
    model.load_state_dict(
        {name: own[name] if is_sharded(live[name]) else tensors[first] for name, first in first_names.items()}
    )


def infinite_buffers(model: nn.Module) -> frozenset[str]:
    """Return the entries (`model/mask`) of buffers that hold infinities now, as a mask of attention does on purpose.

    For `AsyncWriter`, before training: later they could not be distinguished from an error. Synchronises the device.
    """
    buffers = {f"model/{name}": buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return frozenset(name for name, buffer in buffers.items() if buffer.isinf().any())


def pack_optimizer(
    optimizer: Optimizer, *, names: Mapping[nn.Parameter, str], gather: bool = True, placed: Placed = _whole
) -> tuple[dict[str, Tensor], JSON]:
    """Return an optimizer's state as (tensors, JSON), keyed by parameter name instead of by position.

    Not `torch.distributed.checkpoint.state_dict`, which has names, too: it takes the state of another class and of
    another shape, casts it to the parameter's dtype, and takes a step to make state where there is none yet
    (`tests/faults/storage/test_b_optimizer_state.py`).

    Args:
        optimizer: the optimizer itself, not a wrapper around it.
        names: the name of each parameter, as `{parameter: name for name, parameter in model.named_parameters()}`.
        gather: as for `pack_model`.
        placed: the same.

    Returns:
        Tensors under `<entry>/<parameter>` (`exp_avg/layer.weight`), a group's tensor options under
        `group-<i>/<option>`, and on rank 0 only what is sharded; and everything else: class, groups with their options
        (tuples as tuples), scalars, shapes and dtypes.

    Raises:
        CheckpointError: where state belongs to no named parameter, so that it would be lost.
    """
    groups = _named_groups(optimizer, names=names)
    strangers = len(optimizer.state.keys() - {parameter for group in groups for parameter in group.values()})
    if strangers:
        raise CheckpointError(
            f"{type(optimizer).__name__} keeps state for {strangers} keys that are no parameter in its groups, and it "
            f"would be lost: keep state per parameter"
        )
    tensors: dict[str, Tensor] = {}
    described: list[JSON] = []
    parameters: dict[str, JSON] = {}
    for index, (group, members) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        options = {key: value for key, value in group.items() if key != "params"}
        found, values = _split(options)
        tensors |= {f"group-{index}/{key}": _dense(key, tensor) for key, tensor in found.items()}
        described.append({"parameters": list(members), "options": values, "tensors": list(found)})
        for name, parameter in members.items():
            found, values = _split(optimizer.state.get(parameter, {}))
            of = placed(name, parameter)
            tensors |= {
                f"{key}/{name}": _dense(f"{key}/{name}", placed(name, tensor), of=of) for key, tensor in found.items()
            }
            form = _form(of.shape, of.dtype)
            parameters[name] = {"form": form, "values": values, "tensors": list(found)}
    state: JSON = {"class": type(optimizer).__qualname__, "groups": described, "parameters": parameters}
    return _packed(tensors, gather=gather), state


def unpack_optimizer(
    optimizer: Optimizer,
    *,
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    state: JSON,
    placed: Placed = _whole,
) -> None:
    """Load what `pack_optimizer` gave into an optimizer of the same class over the same parameters.

    Not `Optimizer.load_state_dict`: it takes AdamW's state into SGD without a word, goes by position, and casts state
    to the parameter's dtype. Options (learning rate, betas, fused, …) become those of the checkpoint; one that the
    checkpoint does not know, because a newer torch brought it, keeps its value.

    Raises:
        CheckpointError: where class, groups, parameter names, their order, shapes or dtypes differ; the text lists the
            differences, and the optimizer is as it was.
    """
    groups = _named_groups(optimizer, names=names)
    saved = cast("dict[str, Any]", state)
    try:
        wanted = [{name: placed(name, parameter) for name, parameter in group.items()} for group in groups]
        differences = list(_optimizer_differences(optimizer, groups=wanted, saved=saved, tensors=tensors))
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"this is not the state of an optimizer as dptrain packs it: {error!r}") from error
    _refuse("optimizer", differences)
    optimizer.state.clear()
    for index, (group, members) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        described = saved["groups"][index]
        group.update(described["options"])
        for key in described["tensors"]:
            group[key] = _option(group.get(key), saved=tensors[f"group-{index}/{key}"])
        on_device = bool(group.get("fused") or group.get("capturable"))
        for name, parameter in members.items():
            entry = saved["parameters"][name]
            restored = dict(entry["values"])
            for key in entry["tensors"]:
                # Torch's own rule: the step counter is on the host unless the kernel itself increments it.
                like = placed(name, parameter) if key != "step" or on_device else torch.empty((), device="cpu")
                found = _laid_out(tensors[f"{key}/{name}"], like=like)
                is_part = is_sharded(found) and not is_sharded(parameter)
                restored[key] = cast("Any", found).to_local() if is_part else found
            if restored:
                optimizer.state[parameter] = restored


def _named_groups(optimizer: Optimizer, *, names: Mapping[nn.Parameter, str]) -> list[dict[str, nn.Parameter]]:
    """Each group's parameters by name, in the group's order."""
    groups: list[dict[str, nn.Parameter]] = []
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter not in names:
                raise CheckpointError(
                    f"parameter {position} of group {index} of {type(optimizer).__name__}, of shape "
                    f"{tuple(parameter.shape)}, has no name: give the optimizer parameters of the model only"
                )
        groups.append({names[parameter]: parameter for parameter in group["params"]})
    assert sum(map(len, groups)) == len({name for group in groups for name in group}), "a name stands twice"
    return groups


def _split(entries: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part tensors from everything else."""
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in entries.items() if key not in tensors}


def _option(live: object, *, saved: Tensor) -> Tensor:
    """Restore a tensor option in place where that is possible: a compiled step holds on to the tensor itself."""
    if isinstance(live, Tensor) and live.shape == saved.shape and live.dtype == saved.dtype:
        live.detach().copy_(saved)
        return live
    return saved.clone()


def _laid_out(saved: Tensor, *, like: Tensor) -> Tensor:
    """Copy state to where `like` is, in its own dtype; with strides and shards of `like` where it has its shape."""
    if saved.shape != like.shape:
        return saved.to(device=like.device, copy=True)
    placed = torch.empty_like(like, dtype=saved.dtype, requires_grad=False)
    if is_sharded(placed):
        _copy_shard(placed, whole=saved)
        return placed
    return placed.copy_(saved)


def _dense(name: str, value: object, *, of: Tensor | None = None) -> Tensor:
    """Refuse what a checkpoint cannot hold, or not give back; `of` is the parameter that the value is state of."""
    plain = isinstance(value, Tensor) and (type(value.detach()) is Tensor or is_sharded(value))
    if not isinstance(value, Tensor) or not plain or value.layout is not torch.strided:
        raise CheckpointError(
            f"{name!r} is a {type(value).__name__}, and a checkpoint holds dense tensors only: convert it first"
        )
    # A single plain number, such as the count of steps, is the same on all ranks.
    depends = is_sharded(value) or value.numel() > 1
    if of is not None and is_sharded(of) and depends and value.shape != of.shape:
        raise CheckpointError(
            f"{name!r} is sharded and of shape {tuple(value.shape)}, its parameter of shape {tuple(of.shape)}, so that "
            f"nothing would say how to shard it again: use an optimizer whose state has the parameter's shape"
        )
    return value.detach()


# --- shards ----------------------------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is cut up over ranks."""
    # By its method: to import DTensor only to ask for its type would double the import time.
    return hasattr(tensor, "full_tensor")


def _packed(entries: Mapping[str, Tensor], *, gather: bool) -> dict[str, Tensor]:
    if gather:
        return _unshared(_gathered(entries))
    return {name: tensor for name, tensor in entries.items() if is_sharded(tensor)} | _unshared(
        {name: tensor for name, tensor in entries.items() if not is_sharded(tensor)}
    )


def _gathered(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors; sharded ones by one collective each, in the order given, and then on rank 0 only."""
    whole = {}
    for name, tensor in entries.items():
        if is_sharded(tensor):
            gathered = cast("Any", tensor).full_tensor()
            if dist.get_rank() == 0:
                whole[name] = gathered.cpu()
            del gathered  # before the next one needs the room
        else:
            whole[name] = tensor
    return whole


def _copy_shard(sharded: Tensor, *, whole: Tensor) -> None:
    """Copy this rank's shard of `whole` in place, without a collective."""
    from torch.distributed.tensor import distribute_tensor

    live = cast("Any", sharded)
    shard = distribute_tensor(whole, live.device_mesh, live.placements, src_data_rank=None)
    live.to_local().copy_(shard.to_local())


# --- memory ----------------------------------------------------------------------------------------------------------


def _entries(model: nn.Module, placed: Placed) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict, and for each of its names the first name of the same tensor: itself, unless weights are tied."""
    # The state dict first: it makes FSDP put the shards back into the modules, where they are looked for next.
    live = {name: placed(name, _dense(name, value)) for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    firsts: dict[object, str] = {}
    return live, {
        name: firsts.setdefault(_identity(name, tensor, parameter=parameters.get(name)), name)
        for name, tensor in live.items()
    }


def _identity(name: str, tensor: Tensor, *, parameter: nn.Parameter | None) -> object:
    if is_sharded(tensor):
        return name if parameter is None else id(parameter)  # a shard may be empty here and not on another rank
    if not tensor.numel():
        return name  # no memory, so nothing to share
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _unshared(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, copied where they share a storage with an earlier one: safetensors takes no others."""
    seen: set[tuple[torch.device, int]] = set()
    unshared = {}
    for name, tensor in entries.items():
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        unshared[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen.add(storage)
    return unshared


def _form(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _optimizer_differences(
    optimizer: Optimizer,
    *,
    groups: list[dict[str, Tensor]],
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Iterator[str]:
    live_class = type(optimizer).__qualname__
    if saved["class"] != live_class:
        yield f"it is {live_class} here and {saved['class']} in the checkpoint"
    if len(saved["groups"]) != len(groups):
        yield f"it has {len(groups)} groups here and {len(saved['groups'])} in the checkpoint"
    forms = {name: entry["form"] for name, entry in saved["parameters"].items()}
    parameters = {name: parameter for group in groups for name, parameter in group.items()}
    live = {name: _form(parameter.shape, parameter.dtype) for name, parameter in parameters.items()}
    yield from _differences(live=live, saved=forms)
    for index, (members, described) in enumerate(zip(groups, saved["groups"], strict=False)):
        if list(members) != described["parameters"]:
            yield (
                f"group {index} holds {len(members)} parameters here and {len(described['parameters'])} in the "
                f"checkpoint, or holds them in another order"
            )
    expected = {f"group-{i}/{key}" for i, described in enumerate(saved["groups"]) for key in described["tensors"]}
    expected |= {f"{key}/{name}" for name, entry in saved["parameters"].items() for key in entry["tensors"]}
    yield from (f"tensor {name!r} is announced and not there" for name in sorted(expected - tensors.keys()))
    yield from (f"tensor {name!r} is there unannounced" for name in sorted(tensors.keys() - expected))


def _differences(*, live: Mapping[str, str], saved: Mapping[str, str]) -> Iterator[str]:
    """Where two mappings of name to form part."""
    yield from (f"{name!r} is not in the checkpoint" for name in live if name not in saved)
    yield from (f"{name!r} is only in the checkpoint" for name in saved if name not in live)
    for name, form in live.items():
        if saved.get(name, form) != form:
            yield f"{name!r} is {form} here and {saved[name]} in the checkpoint"


def _refuse(what: str, differences: list[str]) -> None:
    if differences:
        shown = "; ".join(differences[:_MAX_DIFFERENCES])
        more = len(differences) - _MAX_DIFFERENCES
        raise MismatchError(
            f"the checkpoint does not fit this {what}: {shown}{f'; and {more} more' if more > 0 else ''}. "
            f"Build the {what} as it was when the checkpoint was written"
        )
