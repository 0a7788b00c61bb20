"""The optimizer of a run, by name, and its skippable step: gradients that are not finite change nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Muon, Optimizer, SparseAdam

from dptrain.config.filled_in import given
from dptrain.config.scaling_rules import BetaScaling
from dptrain.config.train_config import OptimizerConfig
from dptrain.errors import ConfigError
from dptrain.models.gpt import output_layers
from dptrain.tasks.base import ParameterGroups
from dptrain.tasks.check import reported
from dptrain.tasks.resolve import load_object

_REFUSED: Mapping[type[Optimizer], str] = {
    LBFGS: "asks for the loss several times in a step",
    SparseAdam: "needs sparse gradients, which replicas cannot combine",
}
_BY_NAME: Mapping[str, type[Optimizer]] = {
    name.lower(): found
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, Optimizer) and found not in (Optimizer, *_REFUSED)
}
_NUM_STATES = {"sgd": 1, "adagrad": 1, "muon": 2, "asgd": 2}
_RATIO = "lr_ratio"
"""Name in a group of its rate over the run's."""
_TUNED = "tuned_"
"""Before the names of a group's betas and weight decay as they were given, at the reference batch."""


def num_states(config: OptimizerConfig) -> int:
    """Return how many tensors of the size of the parameters an optimizer keeps; 2, as Adam, where that is not known."""
    return _NUM_STATES.get(config.name.lower(), 2)


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, *, parameter_groups: ParameterGroups | None = None
) -> Optimizer:
    """Build the optimizer over the trainable parameters; vectors (biases, norms) are not decayed.

    The fused implementations are used where there are some, because they skip a step on the device (`found_inf`).

    Args:
        config: filled in. Its name is a class of `torch.optim`, an import path of a class, or of a function of the
            model that returns parameter groups or an optimizer.
        model: not wrapped.
        parameter_groups: the task's, in place of the groups by shape.

    Raises:
        ConfigError: where there is no such optimizer, an option is not one of its, or a group is out of order.
    """
    optimizer = _built_as_named(config, model, parameter_groups=parameter_groups)
    for group in optimizer.param_groups:
        group.update({f"{_TUNED}{name}": group[name] for name in ("betas", "weight_decay") if name in group})
    return optimizer


def _built_as_named(
    config: OptimizerConfig, model: nn.Module, *, parameter_groups: ParameterGroups | None
) -> Optimizer:
    found = _find(config.name)
    if isinstance(found, type):
        if parameter_groups is None:
            return _built(found, _groups(found, config, model), config=config, model=model)
        with reported("parameter_groups of the task must return dicts with 'params'"):
            groups = _dicts(parameter_groups(model))
        return _built(found, groups, config=config, model=model)
    with reported(f"{config.name} must take the model and return dicts with 'params', or an optimizer"):
        made = found(model)
        groups = [] if isinstance(made, Optimizer) else _dicts(made)
    if isinstance(made, Optimizer):
        if config.options:
            raise ConfigError(
                f"{config.name} returns an optimizer, and optimizer.options would be ignored: leave it out"
            )
        _note_ratios(made.param_groups, config=config)
        _check_complete(made.param_groups, model=model)
        return made
    return _built(AdamW, groups, config=config, model=model)


def _find(name: str) -> type[Optimizer] | Callable[[nn.Module], Any]:
    if name.lower() in _BY_NAME:
        return _BY_NAME[name.lower()]
    if ":" not in name and "." not in name:
        close = get_close_matches(name.lower(), list(_BY_NAME), n=1)
        hint = f", did you mean {_BY_NAME[close[0]].__name__.lower()!r}?" if close else ""
        raise ConfigError(
            f"there is no optimizer {name!r}{hint}; it is a class of torch.optim ({', '.join(sorted(_BY_NAME))}), or "
            f"an import path such as package.module:Class or file.py:function"
        )
    found = load_object(name)
    if isinstance(found, type) and not issubclass(found, Optimizer):
        raise ConfigError(f"{name} is a class, but not one derived from torch.optim.Optimizer")
    if isinstance(found, type) and issubclass(found, tuple(_REFUSED)):
        reason = next(reason for kind, reason in _REFUSED.items() if issubclass(found, kind))
        raise ConfigError(f"{name} {reason}: choose another optimizer")
    return cast("type[Optimizer]", found)


def _groups(kind: type[Optimizer], config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Return matrices, which decay, and vectors, which do not; for Muon, what it is not made for goes to AdamW."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    others = _not_for_muon(model) if issubclass(kind, Muon) else set()
    beside = {"optimizer": "adamw"} if issubclass(kind, Muon) else {}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() > 1 and p not in others], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p in others], "weight_decay": config.weight_decay, **beside},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0, **beside},
    ]
    return [group for group in groups if group["params"]]


def _not_for_muon(model: nn.Module) -> set[nn.Parameter]:
    """Return embeddings, output layers and tensors that are no matrices (Jordan et al. 2024, "Muon")."""
    embeddings: list[Any] = [m.weight for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    last = [layer.weight for layer in output_layers(model)]
    return {*embeddings, *last, *(p for p in model.parameters() if p.dim() > 2)}  # noqa: PLR2004 - matrices


def _dicts(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [dict(group) for group in groups]
    for group in found:
        group["params"] = list(group["params"]) if not isinstance(group["params"], Tensor) else [group["params"]]
    return found


def _built(
    kind: type[Optimizer], groups: list[dict[str, Any]], *, config: OptimizerConfig, model: nn.Module
) -> Optimizer:
    """Build one optimizer, or several in one where groups name a class of their own."""
    _note_ratios(groups, config=config)
    _check_complete(groups, model=model)
    kinds = [_class_of(group.pop("optimizer", None), default=kind) for group in groups]
    members = []
    for each in dict.fromkeys(kinds):
        own = [group for group, of in zip(groups, kinds, strict=True) if of is each]
        members.append(_one(each, own, config=config, options=config.options if each is kind else {}))
    return members[0] if len(members) == 1 else CombinedOptimizer(members)


def _class_of(name: str | None, *, default: type[Optimizer]) -> type[Optimizer]:
    if name is None:
        return default
    found = _find(name)
    if not isinstance(found, type):
        raise ConfigError(f"the optimizer of a parameter group must be a class, got {name!r}")
    return found


def _one(
    kind: type[Optimizer], groups: list[dict[str, Any]], *, config: OptimizerConfig, options: Mapping[str, Any]
) -> Optimizer:
    accepted = inspect.signature(kind).parameters
    defaults: dict[str, Any] = {
        "lr": given(config.learning_rate),
        "betas": (config.beta1, config.beta2),
        # L2 terms are no decay to speak of under Adam's division: where a class can decouple them, it does.
        "decoupled_weight_decay": True,
        "fused": _can_fuse(p for group in groups for p in group["params"]),
        # So that one rate fits Muon's matrices and AdamW's rest (Liu et al. 2025, arXiv 2502.16982).
        "adjust_lr_fn": "match_rms_adamw",
    }
    if issubclass(kind, SGD):
        defaults["momentum"] = config.beta1
    settings = {name: value for name, value in defaults.items() if name in accepted} | dict(options)
    has_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    if unknown := [name for name in options if name not in accepted and not has_any]:
        names = [name for name in accepted if name not in ("self", "params")]
        raise ConfigError(f"{kind.__name__} has no option {unknown[0]!r}; its options are {', '.join(names)}")
    if "lr" in options:
        raise ConfigError("optimizer.options has lr, which would be ignored: give optimizer.learning_rate")
    for group in groups if "weight_decay" in accepted else ():
        group.setdefault("weight_decay", config.weight_decay)
        if "weight_decay" in options and group["weight_decay"]:
            group["weight_decay"] = options["weight_decay"]
    try:
        # Any class has its own arguments.
        optimizer: Optimizer = cast("Any", kind)(groups, **settings)
    except Exception as error:  # whatever a class of the user's raises
        raise ConfigError(f"{kind.__name__} cannot be built: {error}") from error
    if isinstance(optimizer, SGD) and settings.get("momentum"):
        # Fused SGD leaves its buffers uninitialised if the very first step is skipped. Zeros give the same first
        # step, bit for bit, as no buffer does; with dampening they do not, and none are made.
        for group in optimizer.param_groups:
            for parameter in group["params"] if not group["dampening"] else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _note_ratios(groups: Sequence[dict[str, Any]], *, config: OptimizerConfig) -> None:
    """Keep each group's own rate as a ratio to the run's, so that it follows the schedule and the batch with it."""
    for group in groups:
        if "lr" in group:
            group[_RATIO] = float(group["lr"]) / given(config.learning_rate)


def _check_complete(groups: Sequence[Mapping[str, Any]], *, model: nn.Module) -> None:
    """Refuse groups that leave a trainable parameter out, which would silently stay as it is, or hold a frozen one."""
    held = [parameter for group in groups for parameter in group["params"]]
    names = {parameter: name for name, parameter in model.named_parameters()}
    missing = [name for parameter, name in names.items() if parameter.requires_grad and parameter not in set(held)]
    if missing:
        raise ConfigError(
            f"the parameter groups leave out {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}: "  # noqa: PLR2004 - a few
            f"give them a group, or freeze them with requires_grad_(False)"
        )


class CombinedOptimizer(Optimizer):
    """Several optimizers over parameters of their own, stepped one after the other; groups and state are one list each.

    Args:
        members: at least two.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        # Not by Optimizer's own constructor, which would copy the groups: a rate set here must reach the members.
        super().__init__([nn.Parameter(torch.empty(0))], {})
        self._members = tuple(members)
        self.param_groups = [group for member in members for group in member.param_groups]
        for member in members:
            self.state.update(member.state)
        for member in members:
            member.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override] # noqa: ANN401 - as torch has it
        """Step all members."""
        assert closure is None, "no closure is taken"
        for member in self._members:
            member.step()


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def set_rate(
    optimizer: Optimizer,
    learning_rate: float,
    *,
    betas: BetaScaling | None = None,
    decay_factor: float | None = None,
) -> None:
    """Set the learning rate of all groups, each in its ratio to the run's, and what else follows the batch.

    Args:
        optimizer: from `build_optimizer`.
        learning_rate: of the run.
        betas: how the betas of each group follow the batch, from those that it was built with.
        decay_factor: on the weight decay that each group was built with.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_RATIO, 1.0)
        if betas is not None and "betas" in group:
            scaled = betas.scaled(tuple(group[f"{_TUNED}betas"]))
            group["betas"] = (scaled.beta1, scaled.beta2)
        if decay_factor is not None and "weight_decay" in group:
            group["weight_decay"] = decay_factor * group[f"{_TUNED}weight_decay"]


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether a step can be skipped without the host knowing; else each step waits for the device once."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def step_if_finite(optimizer: Optimizer, grad_norm: Tensor, *, grad_scale: Tensor | None = None) -> Tensor:
    """Take an optimizer step unless the gradient's norm is not finite: then parameters and moments stay as they are.

    The norm is that of the combined gradient, so all replicas skip together or not at all. (Synchronises the device
    where the optimizer cannot skip by itself.)

    Args:
        optimizer: its parameters have their gradients.
        grad_norm: without the scale.
        grad_scale: factor on the gradients, by which the step divides them; None for 1.

    Returns:
        1 where the norm was not finite, else 0; a float32 scalar on the device.
    """
    # Infinity minus itself is NaN, which is not 0; `torch.isfinite` is four kernels.
    not_finite = (grad_norm - grad_norm).ne(0).to(torch.float32)
    if skips_on_device(optimizer):
        # The protocol of torch.amp.GradScaler with fused optimizers.
        optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        optimizer.found_inf = not_finite  # type: ignore[attr-defined]
        optimizer.step()
    elif not_finite.item() == 0:
        if grad_scale is not None:
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(grads, 1 / grad_scale)
        optimizer.step()
    return not_finite
