"""Names for parts of a model, so that each gets a noise scale of its own; what is summed per part stands elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dptrain.errors import ObservationError

GroupsLike = (
    Mapping[str, str | Iterable[nn.Parameter]] | Literal["module", "experts", "local_blocks"] | torch.optim.Optimizer
)

_ROUTERS = frozenset({"router", "gate"})
REST = "rest"
"""The group of those parameters that no given group names; with it the groups always add up to the whole."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which part of the model each trained parameter belongs to.

    Attributes:
        names: one for each group; empty where only the whole model is of interest.
        labels: for each trained parameter, in the order of `model.parameters()`, the number of its group.
        shares: by which each one's square is multiplied: below 1 where several ranks of one replica hold the same
            parameter, above 1 where a rank holds a part of it; empty where each counts once.
        rows: number of a trained parameter → the group of each of its rows, in place of its label; for weights of
            experts that are stacked along the first dimension.
    """

    names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    rows: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def num_entries(self) -> int:
        """Squared norms that describe one gradient: one per group, or one for the whole."""
        return max(len(self.names), 1)

    def counted_once(self, num_parts: Sequence[int]) -> Groups:
        """Return the groups for a gradient of which each rank has parts, so that the mean over ranks is of the whole.

        Args:
            num_parts: of each trained parameter, each on as many ranks; 1 where a rank has it whole.
        """
        if not self.names or max(num_parts, default=1) == 1:  # without groups the norm of the whole is known
            return self
        return replace(self, shares=tuple(map(float, num_parts)))

    def squares(self, norms: Mapping[int, Tensor], *, zero: Tensor) -> Tensor:
        """Add up the squares of single parameters' norms by group.

        Args:
            norms: number of the trained parameter → scalar, or a vector where its rows belong to several groups.
            zero: a float64 zero on the device.

        Returns:
            A float64 vector of `num_entries`.
        """
        if not norms:
            return zero.expand(self.num_entries)
        if self.rows:
            values = torch.cat([norm.reshape(-1) for norm in norms.values()]).double().square()
        else:
            values = torch.stack(list(norms.values())).double().square()
        if not self.names and not self.shares:
            return values.sum().reshape(1)
        labels_of = [self.rows.get(i, self.labels[i : i + 1]) for i in norms] if self.names else [(0,)] * len(norms)
        labels = tuple(label for found in labels_of for label in found)
        shares = None
        if self.shares:
            shares = tuple(self.shares[i] for i, found in zip(norms, labels_of, strict=True) for _ in found)
        return _membership(labels, shares, self.num_entries, values.device) @ values


@functools.lru_cache(maxsize=64)
def _membership(
    labels: tuple[int, ...], shares: tuple[float, ...] | None, num_groups: int, device: torch.device
) -> Tensor:
    """Return the matrix that adds up by group, kept so that it is not sent to the device each time.

    A product has a fixed order of addition; a scatter has none on a GPU.
    """
    matrix = torch.nn.functional.one_hot(torch.tensor(labels), num_groups).T.double()
    return (matrix if shares is None else matrix * torch.tensor(shares, dtype=torch.float64)).to(device)


def resolve_groups(groups: GroupsLike | None, *, model: nn.Module, by_rows: bool = True) -> Groups:
    """Return the group of each trained parameter of `model`.

    Args:
        groups: name → prefix of parameter names (whole components) or the parameters themselves; "module" for the
            model's first-level children; "experts" for each expert of a mixture, see `expert_groups`; "local_blocks"
            for parts with losses of their own, which the model's method of that name tells; an optimizer for its
            parameter groups, named by their "name" where they have one and `group_0`, `group_1`, … where not; None for
            the whole model alone.
        model: without DDP and torch.compile round it.
        by_rows: with "experts", tell apart experts whose weights are stacked in one tensor. Not for a norm or a
            reduction that knows whole parameters alone; these experts are then one group for each layer.

    Raises:
        ObservationError: for a parameter in two groups, or a group without trained parameters.
    """
    if groups is None:
        return Groups()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = _wanted(groups, model=model)
    owner: dict[int, str] = {}
    for group, members in wanted.items():
        if isinstance(members, str):
            found = [p for name, p in named.items() if name == members or name.startswith(f"{members}.")]
        else:
            found = [p for p in members if p.requires_grad]
        if not found:
            raise ObservationError(
                f"group {group!r} holds no trained parameter: give parameters, or a prefix such as "
                f"{next(iter(named)).rpartition('.')[0]!r}"
            )
        for parameter in found:
            if owner.setdefault(id(parameter), group) != group:
                raise ObservationError(
                    f"a parameter of shape {tuple(parameter.shape)} is in group {owner[id(parameter)]!r} and in "
                    f"{group!r}: groups must not overlap, or they would not add up to the whole"
                )
    chosen = [owner.get(id(p), REST) for p in named.values()]
    names = [name for name in wanted if name in chosen]
    if REST in chosen and REST not in names:
        names.append(REST)
    resolved = Groups(names=tuple(names), labels=tuple(names.index(name) for name in chosen))
    if groups == "experts" and by_rows:
        return _stacked_apart(resolved, model=model, parameters=list(named.values()))
    return resolved


def _stacked_apart(groups: Groups, *, model: nn.Module, parameters: list[nn.Parameter]) -> Groups:
    """Return a group for each expert of a layer in place of one for the layer, where the weights say which is which."""
    modules = {label: model.get_submodule(name) for label, name in enumerate(groups.names) if name != REST}
    counts = {
        label: _num_stacked(module, [p for p, own in zip(parameters, groups.labels, strict=True) if own == label])
        for label, module in modules.items()
    }
    names: list[str] = []
    first: dict[int, int] = {}
    for label, name in enumerate(groups.names):
        first[label] = len(names)
        names += [f"{name}.{expert}" for expert in range(counts.get(label, 0))] or [name]
    rows = {
        index: tuple(first[label] + expert for expert in _own_experts(modules[label], counts[label]))
        for index, label in enumerate(groups.labels)
        if counts.get(label, 0)
    }
    return Groups(names=tuple(names), labels=tuple(first[label] for label in groups.labels), rows=rows)


def _num_stacked(module: nn.Module, parameters: list[nn.Parameter]) -> int:
    """Return how many experts are stacked in the parameters of a module; 0 where that cannot be told from them.

    The module must say how many it has: a first dimension alone might be a width. A sharded tensor (DTensor) has
    other rows on each rank.
    """
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int):
        return 0
    rows = len(_own_experts(module, count))
    stacked = all(p.dim() > 1 and p.shape[0] == rows and not hasattr(p, "placements") for p in parameters)
    return count if stacked else 0


def _own_experts(module: nn.Module, count: int) -> range:
    """Return the experts that this rank has of a layer: all, unless the module says otherwise."""
    own = getattr(module, "own_experts", None)
    return own if isinstance(own, range) else range(count)


def _wanted(groups: GroupsLike, *, model: nn.Module) -> Mapping[str, str | Iterable[nn.Parameter]]:
    if isinstance(groups, Mapping):
        return groups
    if groups == "experts":
        return expert_groups(model)
    if groups == "local_blocks":
        return _local_blocks(model)
    if groups == "module":
        seen: set[int] = set()
        children = {}
        for name, child in model.named_children():
            # A tied parameter belongs to the first child that has it.
            own = [p for p in child.parameters() if p.requires_grad and id(p) not in seen]
            seen.update(id(p) for p in own)
            if own:
                children[name] = own
        return children
    param_groups = getattr(groups, "param_groups", None)
    if param_groups is None:
        raise ObservationError(
            f"groups must be a mapping, 'module', 'experts', 'local_blocks' or an optimizer, got {groups!r}"
        )
    found = {str(group.get("name", f"group_{i}")): group["params"] for i, group in enumerate(param_groups)}
    return {name: parameters for name, parameters in found.items() if any(p.requires_grad for p in parameters)}


def _local_blocks(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    told = getattr(model, "local_blocks", None)
    found: dict[str, list[nn.Parameter]] = told() if callable(told) else {}
    if len(found) < 2:  # noqa: PLR2004 - the whole model is measured anyway
        raise ObservationError(
            "groups='local_blocks' needs a model with parts that are trained by losses of their own, and a method "
            "local_blocks() that returns their parameters by name: name the parameters yourself, as in "
            "groups={'first half': model.first.parameters()}"
        )
    return {name: trained for name, own in found.items() if (trained := [p for p in own if p.requires_grad])}


def expert_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters of each expert, by the names of their modules.

    An expert is an entry of a `ModuleList` or `ModuleDict` called `experts`. Where the experts' weights are stacked in
    one tensor, what is called `experts` in a block is one entry here; `resolve_groups` distinguishes its experts by the
    rows of the tensors where the module has the attribute `num_experts`. What is outside of them is the group `rest`.
    The noise scale of a group counts samples of the batch; `routed_noise_scale` of `dptrain.noise.derived` counts
    routed ones.

    Raises:
        ObservationError: for a model without experts.
    """
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        # Every sample passes by the router, which is no expert.
        if parameter.requires_grad and "experts" in parts[:-1] and not _ROUTERS & set(parts):
            end = parts.index("experts") + 1
            if isinstance(model.get_submodule(".".join(parts[:end])), (nn.ModuleList, nn.ModuleDict)):
                end += 1
            found.setdefault(".".join(parts[:end]), []).append(parameter)
    if not found:
        raise ObservationError(
            "groups='experts' needs modules called 'experts' in the model: name the parameters yourself, as in "
            "groups={'expert 0': model.expert_0.parameters()}"
        )
    return found
