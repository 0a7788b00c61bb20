"""Weights to start from: a file, a folder of others, a run, a checkpoint; what holds none is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dptrain.errors import ConfigError
from dptrain.train.preparation.weights import read_weights
from tests.runs import attempt, load_newest

TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_files_and_folders_of_others_are_read(tmp_path):
    """One file, a folder with model.safetensors, and a folder with an index of several."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert same(read_weights(tmp_path / "model.safetensors"), TENSORS)
    assert same(read_weights(tmp_path), TENSORS)
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(read_weights(folder), TENSORS)


def test_a_run_and_a_checkpoint_are_read(tmp_path):
    """The newest checkpoint of a run, and the one that is named."""
    attempt(tmp_path / "run")
    saved = load_newest(tmp_path / "run" / "checkpoints")
    oldest = min((tmp_path / "run" / "checkpoints").iterdir())
    assert same(read_weights(tmp_path / "run"), saved.tensors("model"))
    assert not torch.equal(read_weights(oldest)["0.weight"], saved.tensors("model")["0.weight"])


def test_what_holds_no_weights_is_refused(tmp_path):
    """Nothing there, a pickle, an empty folder, an index that leads out of its folder: each in one sentence."""
    with pytest.raises(ConfigError, match=r"there are no weights .*nothing is downloaded"):
        read_weights(tmp_path / "none")
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="is a pickle"):
        read_weights(tmp_path / "model.bin")
    with pytest.raises(ConfigError, match="holds no weights"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ConfigError, match="not a file beside it"):
        read_weights(tmp_path)
