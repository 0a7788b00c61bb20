"""The bare weights of a checkpoint, for readers that know nothing of dptrain."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dptrain.checkpoint.store import save_checkpoint
from dptrain.cli.export import export
from dptrain.errors import CheckpointError, ConfigError


def save(run, step):
    weights = {"layer.weight": torch.full((2, 3), float(step)), "count": torch.tensor(step)}
    return save_checkpoint(run / "checkpoints", step=step, tensors={"model": weights, "optimizer": {}}, state={})


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-000000000002"])
def test_a_run_its_checkpoints_or_one_of_them_may_be_named(tmp_path, capsys, place):
    """The newest is taken where none is named; the file holds the weights alone, under their names."""
    for step in (1, 2):
        save(tmp_path, step)
    assert export([str(tmp_path / place), "--to", str(tmp_path / "w.safetensors")]) == 0
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == {"layer.weight", "count"}
    assert found["layer.weight"].tolist() == [[2.0] * 3] * 2
    size_bytes = (tmp_path / "w.safetensors").stat().st_size
    assert capsys.readouterr().out == f"weights of step 2 (2 tensors, {size_bytes} bytes): {tmp_path}/w.safetensors\n"


def test_a_copied_checkpoint_with_another_name_may_be_named(tmp_path):
    """What a folder is called does not matter, what is in it does."""
    shutil.copytree(save(tmp_path, 1), tmp_path / "the best one")
    assert export([str(tmp_path / "the best one"), "--to", str(tmp_path / "w")]) == 0


def test_other_readers_find_what_they_look_for(tmp_path):
    """The metadata says that these are torch's tensors, and of which step."""
    export([str(save(tmp_path, 7)), "--to", str(tmp_path / "w.safetensors")])
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "7"}


def test_the_file_is_private_like_all_of_a_run(tmp_path):
    """Its owner decides who else reads it; nothing is left beside it."""
    export([str(save(tmp_path / "run", 1)), "--to", str(tmp_path / "w")])
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "w"]


def test_a_damaged_newest_one_is_passed_over_aloud(tmp_path, capsys):
    """The one before is written, and the reason is reported; named itself, it is refused."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / "state.json").unlink()
    assert export([str(tmp_path), "--to", str(tmp_path / "w")]) == 0
    said = capsys.readouterr()
    assert "weights of step 1" in said.out
    assert "passed over" in said.err
    with pytest.raises(CheckpointError, match="cannot be trusted"):
        export([str(newest), "--to", str(tmp_path / "x")])


def test_nothing_is_overwritten(tmp_path):
    """A file that is there stays as it is."""
    (tmp_path / "w").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export([str(save(tmp_path, 1)), "--to", str(tmp_path / "w")])
    assert (tmp_path / "w").read_text() == "mine"


@pytest.mark.parametrize("place", ["missing", "empty", "file"])
def test_where_there_is_no_checkpoint_it_says_what_to_name(tmp_path, place):
    """A misspelt folder, an empty one and a file are errors of one sentence."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises((ConfigError, CheckpointError), match=place):
        export([str(tmp_path / place), "--to", str(tmp_path / "w")])


def test_a_folder_that_is_not_there_to_write_to_is_an_error(tmp_path):
    """With the name that was given."""
    with pytest.raises(CheckpointError, match="could not be written to"):
        export([str(save(tmp_path, 1)), "--to", str(tmp_path / "missing" / "w")])


def test_the_averaged_weights_are_written_where_they_are_asked_for(tmp_path):
    """`--averaged` writes them, the default those of the last step; where there are none it says how to get some."""
    weights = {"layer.weight": torch.full((2, 3), 1.0)}
    average = {"layer.weight": torch.full((2, 3), 0.5)}
    run = save_checkpoint(tmp_path, step=1, tensors={"model": weights, "average": average}, state={})
    export([str(run), "--to", str(tmp_path / "last"), "--averaged"])
    export([str(run), "--to", str(tmp_path / "plain")])
    assert torch.equal(load_file(tmp_path / "last")["layer.weight"], average["layer.weight"])
    assert torch.equal(load_file(tmp_path / "plain")["layer.weight"], weights["layer.weight"])
    with pytest.raises(ConfigError, match="holds no averaged weights: train with --optimizer"):
        export([str(save(tmp_path / "other", 1)), "--to", str(tmp_path / "x"), "--averaged"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("member", ["average", "0", "all"])
def test_a_member_of_one_model_is_refused(tmp_path, member):
    """There is nothing to choose from; what a reader may have meant is named."""
    plain = save(tmp_path / "plain", 1)
    weights = {"w": torch.ones(1)}
    both = save_checkpoint(tmp_path / "both", step=1, tensors={"model": weights, "average": weights}, state={})
    with pytest.raises(ConfigError, match=r"one model, equal on all replicas: leave out --member$"):
        export([str(plain), "--to", str(tmp_path / "x"), "--member", member])
    with pytest.raises(ConfigError, match=r"leave out --member, or for the average .* use --averaged"):
        export([str(both), "--to", str(tmp_path / "x"), "--member", member])
    with pytest.raises(ConfigError, match="--member is about weights"):
        export([str(both), "--metrics", str(tmp_path / "x.csv"), "--member", member])
