"""Adapts a model before it is trained: weights to start from, a new head, frozen parts, adapters, fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor, nn

from dptrain.errors import ConfigError
from dptrain.models.int8 import from_int8
from dptrain.models.quantization import quantize_layers
from dptrain.models.settings import ModelConfig

_MAX_NAMED = 5
ReadWeights = Callable[[Path], Mapping[str, Tensor]]
"""Reads the tensors of a path by name."""


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; weights in int8 with scales, as `export --int8` writes, in float32.

    Raises:
        ConfigError: where it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return from_int8(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.weights {path} cannot be read as safetensors: {error}") from error


def adapt_model(model: nn.Module, config: ModelConfig, *, read: ReadWeights = read_safetensors) -> None:
    """Load weights, then add adapters, then freeze, then quantise, as far as the settings ask for it; in place.

    Args:
        model: the task's, initialised.
        config: what is asked for.
        read: reads the weights.

    Raises:
        ConfigError: where weights do not fit, a pattern matches nothing, peft is missing, or a layer has no emulation.
    """
    head = _listed(config.new_head)
    if config.weights is not None:
        _load(model, Path(config.weights).expanduser(), head=head, read=read)
    elif head and config.lora_rank is None and config.freeze is None:
        raise ConfigError("model.new_head is given without model.weights (--from): the whole model is new")
    if config.lora_rank is not None:
        _add_adapters(model, config, rank=config.lora_rank)
    elif config.lora_targets is not None:
        raise ConfigError("model.lora_targets is given without model.lora_rank: it would be ignored")
    for parameter in matching_parameters(model, _listed(config.freeze), setting="model.freeze").values():
        parameter.requires_grad_(False)  # noqa: FBT003 - torch's own
    for parameter in matching_parameters(model, head, setting="model.new_head").values():
        parameter.requires_grad_(True)  # noqa: FBT003 - torch's own
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"model.freeze {config.freeze!r} leaves nothing to train: give a model.new_head, or freeze less"
        )
    if config.quantize is not None:
        quantize_layers(model, to=config.quantize, rounding=config.rounding, unquantized=config.unquantized)


def merge_adapters(model: nn.Module) -> None:
    """Add the product of each layer's adapters to its weight (W + alpha/rank · B·A) and take them out; in place.

    Raises:
        ConfigError: where a weight with adapters is that of another layer, too, which has none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    named = list(model.named_parameters(remove_duplicate=False))
    for name, module in adapted.items():
        base: nn.Module = module.get_base_layer()
        weight = base.weight
        if shared := [other for other, p in named if p is weight and not other.startswith(f"{name}.")]:
            raise ConfigError(
                f"the adapters of {name} cannot be merged: its weight is {shared[0]}, too, which would change with it"
            )
        module.merge()  # peft's own, which knows how each kind of layer lays out its weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)


def matching_parameters(model: nn.Module, patterns: Iterable[str], *, setting: str) -> dict[str, nn.Parameter]:
    """Return the parameters whose names match one of the patterns.

    Raises:
        ConfigError: naming the setting, where a pattern matches nothing.
    """
    named = dict(model.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for pattern in patterns:
        matching = {name: parameter for name, parameter in named.items() if fnmatchcase(name, pattern)}
        if not matching:
            names = ", ".join(list(named)[:_MAX_NAMED])
            raise ConfigError(f"{setting}: no parameter is named {pattern!r}; they are {names}, …")
        found |= matching
    return found


def _load(model: nn.Module, path: Path, *, head: Sequence[str], read: ReadWeights) -> None:
    matching_parameters(model, head, setting="model.new_head")

    def is_new(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in head)

    own = {name: tensor for name, tensor in model.state_dict().items() if not is_new(name)}
    tensors = {name: tensor for name, tensor in read(path).items() if not is_new(name)}
    # A tied tensor may stand under one of its names only.
    given = {tensor.data_ptr() for name, tensor in own.items() if name in tensors}
    missing = [name for name, tensor in own.items() if name not in tensors and tensor.data_ptr() not in given]
    unknown = [name for name in tensors if name not in own]
    shapes = [name for name, tensor in own.items() if name in tensors and tensor.shape != tensors[name].shape]
    for what, names in (("lacks", missing), ("has, and the model has not,", unknown), ("has in another shape", shapes)):
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            raise ConfigError(
                f"model.weights {path} {what} {', '.join(names[:_MAX_NAMED])}{more}: what is to begin anew is "
                f"model.new_head, a pattern of names"
            )
    # Not strict: what is missing now is tied to what is there, or new.
    model.load_state_dict(tensors, strict=False)


def _add_adapters(model: nn.Module, config: ModelConfig, *, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(f"model.lora_rank needs the package peft: pip install 'dptrain[tasks]' ({error})") from error
    targets = _listed(config.lora_targets)
    if not targets:
        raise ConfigError("model.lora_rank needs model.lora_targets, such as attention_in,attention_out")
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=config.lora_alpha, target_modules=targets), model)
    except ValueError as error:
        raise ConfigError(f"no adapters can be added to {', '.join(targets)}: {error}") from error


def _listed(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",") if part.strip()]
