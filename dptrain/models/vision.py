"""Image classifiers of timm and torchvision by name, without weights; nothing is downloaded."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dptrain.errors import ConfigError

_OPERATORS = ("nms", "qnms")
_libraries: list[torch.library.Library] = []
"""Declarations live as long as what declared them."""


def vision_model(name: str, *, num_classes: int) -> tuple[nn.Module, int]:
    """Build `timm:NAME` or `torchvision:NAME`.

    Returns:
        The model, and the size in pixels of the square images that it was made for.

    Raises:
        ConfigError: where the library is missing, or knows no such model.
    """
    library, colon, model = name.partition(":")
    if not colon or library not in ("timm", "torchvision"):
        raise ConfigError(f"model must be timm:NAME or torchvision:NAME, such as timm:resnet18, got {name!r}")
    if library == "timm":
        return _timm_model(model, num_classes=num_classes)
    models: Any = importlib.import_module("torchvision.models") if import_torchvision() else None
    if model not in models.list_models():
        raise ConfigError(f"torchvision has no model {model!r}; torchvision.models.list_models() names them")
    built: nn.Module = models.get_model(model, weights=None, num_classes=num_classes)
    return built, 299 if model == "inception_v3" else 224


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators are made for another kind of device than this torch.

    The wheels on PyPI are built for CUDA. Beside a CPU build of torch their library does not load, and torchvision then
    fails to import, because it describes operators that do not exist. They belong to detection; declared without an
    implementation they let the rest of it be imported, and raise where one is called.

    Raises:
        ConfigError: where torchvision is missing or does not import.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise _missing("torchvision", error) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise _missing("torchvision", error) from error
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _libraries.append(library)
    for operator in _OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise _missing("torchvision", error) from error


def _timm_model(name: str, *, num_classes: int) -> tuple[nn.Module, int]:
    import_torchvision()  # which timm imports
    try:
        timm: Any = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        raise _missing("timm", error) from error
    if not timm.is_model(name):
        close = timm.list_models(f"{name[:6]}*")[:5]
        raise ConfigError(f"timm has no model {name!r}{', but ' + ', '.join(close) if close else ''}")
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
    return model, int(getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1])


def _missing(package: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{package} cannot be imported here ({error}): pip install 'dptrain[vision]', with the release of torchvision "
        f"that goes with torch {torch.__version__}"
    )
