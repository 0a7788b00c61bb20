"""A hook for FSDP2 and `replicate()`: each micro-batch's gradient of the gathered parameters, before it is reduced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from dptrain.errors import ObservationError
from dptrain.observe.geometry import Geometry
from dptrain.observe.groups import Groups
from dptrain.observe.hooks.micro_batches import MicroBatchHook, MicroBatchNorms
from dptrain.observe.hooks.unhook import unhook


class FsdpHook(MicroBatchHook):
    """Squared norm of every micro-batch's gradient, with or without resharding and gradient sync per micro-batch.

    FSDP2 trains shards, which never have a replica's own gradient. But for each forward pass it puts the gathered
    parameters into the modules, always the same objects, and their gradients are the replica's own. So a hook before
    each wrapped module's forward pass, behind FSDP's, finds them there and puts the tensor hooks on: once, or again
    after a step that was not measured.

    Args:
        model: whose wrapped modules are watched.
        groups: which trained parameter belongs where; the whole model by default.
        geometry: the norm; the plain one by default.
    """

    name = "unsharded parameters"

    def __init__(self, model: nn.Module, *, groups: Groups | None = None, geometry: Geometry | None = None) -> None:
        device = next(p for p in model.parameters() if p.requires_grad).device
        super().__init__(device, groups=groups, geometry=geometry)
        self._listening = True
        self._handles: dict[int, tuple[nn.Parameter, RemovableHandle]] = {}
        self._module_handles: list[RemovableHandle] = []
        for module, places in _managed(model).items():
            # What dynamo must not trace: hooks belong to the eager shell round a compiled block.
            find = torch.compiler.disable(self._finder(places))  # type: ignore[no-untyped-call]
            self._module_handles.append(module.register_forward_pre_hook(find))

    def _finder(self, places: list[tuple[int, nn.Module, str]]) -> Callable[[nn.Module, Any], None]:
        def find(module: nn.Module, args: Any) -> None:  # noqa: ANN401, ARG001 - the signature is torch's
            if not self._listening:
                return
            began = self.stopwatch.start()
            for index, owner, name in places:
                self._watch(index, getattr(owner, name))
            self.stopwatch.stop(began)

        return find

    def _watch(self, index: int, parameter: nn.Parameter) -> None:
        known = self._handles.get(index)
        if known is not None and known[0] is parameter:
            return
        if known is not None:
            unhook(*known)
        see = functools.partial(_see_local if hasattr(parameter, "placements") else MicroBatchNorms.see, self._norms)
        handle = parameter.register_hook(functools.partial(see, index))  # type: ignore[no-untyped-call]
        self._handles[index] = (parameter, handle)

    def listen(self, *, on: bool) -> None:
        """Put the hooks on at the next forward pass, or take them off."""
        self._listening = on
        if not on:
            for watched in self._handles.values():
                unhook(*watched)
            self._handles.clear()

    def remove(self) -> None:
        """Take all hooks off, those of the modules too."""
        super().remove()
        for handle in self._module_handles:
            handle.remove()
        self._module_handles.clear()


@torch.no_grad()
def _see_local(norms: MicroBatchNorms, index: int, grad: Any) -> None:  # noqa: ANN401 - a DTensor
    """Note this rank's piece of a gradient that tensor parallelism cuts up.

    A piece may be a summand still, as that of a layer norm whose inputs are cut along the sequence: it is added up
    first, among the ranks of the replica.
    """
    if any(placement.is_partial() for placement in grad.placements):
        from torch.distributed.tensor import Replicate

        grad = grad.redistribute(placements=[Replicate() if p.is_partial() else p for p in grad.placements])
    norms.see(index, grad.to_local())


def _managed(model: nn.Module) -> dict[nn.Module, list[tuple[int, nn.Module, str]]]:
    """Return for each FSDP module where the trained parameters that it gathers stand: (index, owner, name).

    The index counts the trained parameters in the order of `model.parameters()`; of a tied one the first place
    counts, which all its uses share.
    """
    indices = {id(p): i for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}
    places: dict[nn.Module, list[tuple[int, nn.Module, str]]] = {}
    seen: set[int] = set()

    def walk(module: nn.Module, manager: nn.Module | None) -> None:
        """Note the parameters of a module and of all below it; `manager` is the FSDP module round it."""
        manager = module if isinstance(module, FSDPModule) else manager
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in indices or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if manager is None:
                raise ObservationError(
                    f"parameter {name!r} of {type(module).__name__} is in no FSDP module, so nobody reduces its "
                    "gradient: apply fully_shard to the root module too, or freeze it"
                )
            places.setdefault(manager, []).append((indices[id(parameter)], module, name))
        for child in module.children():
            walk(child, manager)

    walk(model, None)
    return places
