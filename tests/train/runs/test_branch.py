"""A run that begins where another one was: the same state and samples, settings of its own."""

from __future__ import annotations

import shutil

import pytest

from dptrain.errors import CheckpointError, ConfigError
from dptrain.tracking.jsonl import read_rows
from dptrain.train import CheckpointConfig, ControlConfig, OptimizerConfig, Trainer
from tests.runs import make_config, noisy, windows

CONSTANT = ControlConfig(law="constant")


def train(folder, **settings):
    settings = {"control": CONSTANT, "max_samples": 120, **settings}
    trainer = Trainer(make_config(folder, **settings), task=noisy)
    trainer.run()
    return [p.detach().flatten().tolist() for p in trainer._bare_model.parameters()]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """A run with all its checkpoints, and what it ended with."""
    folder = tmp_path_factory.mktemp("trunk")
    parameters = train(folder / "run", checkpoint=CheckpointConfig(every_samples=20, keep=100))
    return folder / "run", parameters


def checkpoint_of(run, *, number):
    return sorted((run / "checkpoints").glob("step-*"))[number]


def test_the_same_settings_give_the_same_run(trunk, tmp_path):
    """A branch that changes nothing sees the same samples in the same batches and ends with the same parameters."""
    run, parameters = trunk
    branch = checkpoint_of(run, number=2)
    assert train(tmp_path / "branch", branch_from=str(branch)) == parameters
    reported = windows(tmp_path / "branch")
    assert [rest for _, *rest in reported] == [rest for _, *rest in windows(run)][-len(reported) :]
    assert reported[0][:2] == (1, 4 * int(branch.name.removeprefix("step-")))


def test_batch_rate_and_decay_are_its_own(trunk, tmp_path):
    """What the other optimizer was set to does not come along."""
    run, _ = trunk
    optimizer = OptimizerConfig(learning_rate=0.003, schedule="constant", weight_decay=0.5, beta2=0.5)
    settings = make_config(
        tmp_path / "branch",
        control=CONSTANT,
        max_samples=120,
        branch_from=str(checkpoint_of(run, number=1)),
        global_batch_size=8,
        optimizer=optimizer,
    )
    trainer = Trainer(settings, task=noisy)
    trainer.run()
    assert {batch for _, _, batch, _ in windows(tmp_path / "branch")} == {8}
    assert {row["train/lr"] for row in read_rows(tmp_path / "branch" / "metrics.jsonl") if row["kind"] == "train"} == {
        0.003
    }
    assert trainer._optimizer.param_groups[0]["weight_decay"] == 0.5
    assert trainer._optimizer.param_groups[0]["betas"] == (0.9, 0.5)


def test_a_branch_is_a_run_like_any_other(trunk, tmp_path):
    """It resumes from its own checkpoints, also where the other run is gone."""
    run, parameters = trunk
    gone = tmp_path / "moved"
    settings = {"branch_from": str(gone), "checkpoint": CheckpointConfig(every_samples=20, keep=100)}
    shutil.copytree(checkpoint_of(run, number=1), gone)
    train(tmp_path / "branch", **settings)
    shutil.rmtree(checkpoint_of(tmp_path / "branch", number=-1))
    shutil.rmtree(gone)
    config = make_config(tmp_path / "branch", control=CONSTANT, max_samples=120, **settings)
    trainer = Trainer(config, task=noisy, resume=True)
    trainer.run()
    assert [p.detach().flatten().tolist() for p in trainer._bare_model.parameters()] == parameters


def test_what_cannot_be_branched_from_is_refused(trunk, tmp_path):
    """No checkpoint, and nothing left to train."""
    run, _ = trunk
    with pytest.raises(CheckpointError, match="nothing"):
        train(tmp_path / "one", branch_from=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="max_samples 20 counts from"):
        train(tmp_path / "two", branch_from=str(checkpoint_of(run, number=-1)), max_samples=20)
