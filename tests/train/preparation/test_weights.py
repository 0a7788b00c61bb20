"""Weights to start from: a file, a folder of others, a run, a checkpoint; what holds none is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dptrain.checkpoint.store import save_checkpoint
from dptrain.errors import ConfigError
from dptrain.models.settings import ModelConfig
from dptrain.train.preparation.teacher import load_teacher
from dptrain.train.preparation.weights import read_weights
from tests.runs import attempt, load_newest, make_config

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


def members_of(run, folder, *, kind):
    """Save a checkpoint as of two replicas with parameters of their own, and return both models."""
    attempt(run)
    saved = load_newest(run / "checkpoints")
    first = saved.tensors("model")
    second = {name: tensor + 1 for name, tensor in first.items()}
    config = {**saved.state["config"], "exchange": {"kind": kind}}
    save_checkpoint(
        folder, step=saved.step, tensors={"model": first, "model-1": second}, state={**saved.state, "config": config}
    )
    return first, second


def test_local_updates_give_the_mean_of_their_replicas(tmp_path):
    """It is what was evaluated and what is exported, to start from and to learn from; a replica's own is neither."""
    first, second = members_of(tmp_path / "run", tmp_path / "two" / "checkpoints", kind="local_updates")
    mean = {name: (tensor + second[name]) / 2 for name, tensor in first.items()}
    for found in (read_weights(tmp_path / "two"), load_teacher(tmp_path / "two").state_dict()):
        for name, tensor in mean.items():
            torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("kind", ["ensemble", "codistillation"])
def test_replicas_that_are_models_of_their_own_are_refused(tmp_path, kind):
    """Both refusals name the kind and say how to get one of the models."""
    members_of(tmp_path / "run", tmp_path / "two" / "checkpoints", kind=kind)
    for read in (read_weights, load_teacher):
        with pytest.raises(ConfigError, match=rf"{kind} in .* models of their own.*--member 0 --to FILE"):
            read(tmp_path / "two")


def test_a_run_of_bfloat16_parameters_gives_its_float32_copies(tmp_path):
    """They are what was trained; of frozen parameters there are none, and those are widened for a teacher."""
    config = make_config(tmp_path / "run", precision="bf16_parameters", model=ModelConfig(freeze="0.*"))
    attempt(tmp_path / "run", config=config)
    saved = load_newest(tmp_path / "run" / "checkpoints")
    masters = saved.tensors("masters")
    assert set(masters) == {"3.weight", "3.bias"}
    assert not torch.equal(masters["3.weight"], masters["3.weight"].bfloat16().float())
    expected = {**saved.tensors("model"), **masters}
    assert same(read_weights(tmp_path / "run"), expected)
    teacher = load_teacher(tmp_path / "run").state_dict()
    assert same(teacher, {name: tensor.float() for name, tensor in expected.items()})


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
