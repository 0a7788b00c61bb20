"""The teacher of a distillation: a trained model from a run or from transformers, frozen, and a digest of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dptrain.checkpoint.opened import Checkpoint
from dptrain.data.source import random_state_kept
from dptrain.errors import ConfigError
from dptrain.train.preparation.saved_task import saved_task, trained_weights
from dptrain.train.preparation.weights import find_checkpoint

_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}
"""Ends of the class names in a config.json of transformers → what builds them."""


def load_teacher(source: Path) -> nn.Module:
    """Return a model in eval mode whose parameters need no gradient, on the CPU; random states stay as they are.

    Args:
        source: a run folder, a checkpoint of one, or a folder of transformers. The task of a run is built anew, from
            its settings, so its file must still be where it was. Of local updates it is the mean of the replicas.

    Raises:
        ConfigError: where it is none of these, cannot be built, or its replicas are models of their own.
        CheckpointError: where the run has checkpoints and none can be trusted.
    """
    if not source.is_dir():
        raise ConfigError(f"there is no teacher {source}, as seen from {Path.cwd()}: give a run or a model's folder")
    with random_state_kept():
        checkpoint = find_checkpoint(source)
        model = _of_transformers(source) if checkpoint is None else _of_run(checkpoint)
    return model.eval().requires_grad_(requires_grad=False)


def digest_of(model: nn.Module) -> str:
    """Return a sha256 over class, names, types, shapes and values of a model's parameters and buffers."""
    found = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(_bytes(tensor))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> Any:  # noqa: ANN401 - a buffer
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def _of_run(checkpoint: Checkpoint) -> nn.Module:
    remedy = (
        "a teacher is one model, so write one with `dptrain export --member 0 --to FILE.safetensors`, begin a run with "
        "--from FILE.safetensors, and name that run"
    )
    return saved_task(checkpoint, what="the teacher", tensors=trained_weights(checkpoint, remedy=remedy)).model


def _of_transformers(folder: Path) -> nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{folder} is no teacher: it holds neither a checkpoint of a run nor a config.json")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"this teacher needs transformers: pip install 'dptrain[tasks]' ({error})") from error
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [""]
        kind = next((auto for end, auto in _AUTO.items() if str(names[0]).endswith(end)), None)
        if kind is None:
            ends = ", ".join(_AUTO)
            raise ConfigError(f"{config} names the architecture {names[0]!r}: a teacher's ends in {ends}")
        model: nn.Module = getattr(transformers, kind).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the teacher {folder} cannot be read: {' '.join(str(error).split())}") from error
    return model
