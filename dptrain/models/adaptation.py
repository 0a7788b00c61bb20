"""Adapts a model before it is trained: weights to start from, frozen parts, low-rank adapters."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from dptrain.errors import ConfigError
from dptrain.models.settings import ModelConfig

_MAX_NAMED = 5


def adapt_model(model: nn.Module, config: ModelConfig) -> None:
    """Load weights, then add adapters, then freeze, as far as the settings ask for it; in place.

    Raises:
        ConfigError: where weights do not fit, a pattern matches nothing, or peft is missing.
    """
    if config.weights is not None:
        _load(model, Path(config.weights).expanduser())
    if config.lora_rank is not None:
        _add_adapters(model, config, rank=config.lora_rank)
    elif config.lora_targets is not None:
        raise ConfigError("model.lora_targets is given without model.lora_rank: it would be ignored")
    for pattern in _listed(config.freeze):
        matching = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
        if not matching:
            names = ", ".join([name for name, _ in model.named_parameters()][:_MAX_NAMED])
            raise ConfigError(f"model.freeze: no parameter is named {pattern!r}; they are {names}, …")
        for parameter in matching:
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own


def _load(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.weights {path} cannot be read as safetensors: {error}") from error
    own = model.state_dict()
    # A tied tensor may stand under one of its names only.
    given = {tensor.data_ptr() for name, tensor in own.items() if name in tensors}
    missing = [name for name, tensor in own.items() if name not in tensors and tensor.data_ptr() not in given]
    shared = {name for name in own if name not in tensors} - set(missing)
    unknown = [name for name in tensors if name not in own]
    shapes = [name for name, tensor in tensors.items() if name in own and tensor.shape != own[name].shape]
    for what, names in (("lacks", missing), ("has, and the model has not,", unknown), ("has in another shape", shapes)):
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            raise ConfigError(f"model.weights {path} {what} {', '.join(names[:_MAX_NAMED])}{more}")
    model.load_state_dict(tensors, strict=not shared)


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
