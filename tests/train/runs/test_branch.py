"""A run that begins where another one was: the same state and samples, settings of its own."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from dptrain.cli.train import _findings
from dptrain.errors import CheckpointError, ConfigError
from dptrain.explain.record import RunRecord, read_run
from dptrain.explain.text.account import account
from dptrain.explain.text.findings import about_run
from dptrain.tracking.jsonl import read_rows
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, Trainer
from dptrain.train.run_progress import start_of
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


def test_a_branch_counts_its_own_samples_alone(trunk, tmp_path):
    """Its rate, its FLOPs per sample and its account are those of what it trained; its position goes on from there."""
    run, _ = trunk
    folder, origin = tmp_path / "branch", checkpoint_of(run, number=2)
    train(folder, branch_from=str(origin), log=LogConfig(tracker="none", every_steps=3))
    summary, start = json.loads((folder / "summary.json").read_text()), 4 * int(origin.name.removeprefix("step-"))
    assert (summary["start_samples"], summary["samples_seen"]) == (start, 120)
    assert summary["samples_per_s"] == pytest.approx((120 - start) / summary["wall_s"])
    found, parent = read_run(folder), read_run(run)
    assert (found.start, found.samples_trained) == (start, 120 - start)
    assert (parent.start, parent.samples_trained) == (0, 120)
    per_sample = [record.summary["flops"] / record.samples_trained for record in (found, parent)]
    assert per_sample[0] == pytest.approx(per_sample[1], rel=0.01)
    steps = (120 - start) // 4
    assert account(found)[0].value == f"{120 - start} samples in {steps} optimizer steps"
    assert f"· {120 - start} samples in" in about_run(found)
    assert f"after 120 samples ({120 - start} of this run) in {steps} steps" in next(iter(_findings(summary)))


def test_the_lines_of_a_branch_count_its_own_steps(trunk, tmp_path, capsys):
    """step 3/23 is of the 23 that it takes, not of those of the run that it branched off from."""
    run, _ = trunk
    origin = checkpoint_of(run, number=2)
    log = LogConfig(tracker="none", print_every_steps=1)
    train(tmp_path / "branch", branch_from=str(origin), log=log)
    steps = (120 - 4 * int(origin.name.removeprefix("step-"))) // 4
    assert f"step {steps}/{steps} " in capsys.readouterr().out


def test_where_a_branch_of_an_earlier_version_began_is_not_guessed():
    """Its checkpoint does not say: the rate over the run is not known, and the log tells the rest."""
    progress = {"step": 3, "position": 60, "global_batch_size": 4, "learning_rate_factor": 1.0, "wall_s": 2.0}
    branch, whole = ({"progress": progress, "config": {"branch_from": origin}} for origin in ("runs/a/step-1", None))
    assert start_of(saved=SimpleNamespace(state=branch), branch=None) is None
    assert start_of(saved=SimpleNamespace(state=whole), branch=None) == 0
    rows = [{"step": step, "progress/samples": 40 + 4 * step, "batch/global": 4} for step in (2, 4, 5)]
    logs = {"train": rows, "evals": [], "decisions": [], "summary": {}}
    assert RunRecord(name="a", **logs, config={"branch_from": "runs/a/step-1"}).start == 40
    assert RunRecord(name="a", **logs, config={}).start == 0


def test_what_cannot_be_branched_from_is_refused(trunk, tmp_path):
    """No checkpoint, and nothing left to train."""
    run, _ = trunk
    with pytest.raises(CheckpointError, match="nothing"):
        train(tmp_path / "one", branch_from=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="max_samples 20 counts from"):
        train(tmp_path / "two", branch_from=str(checkpoint_of(run, number=-1)), max_samples=20)
