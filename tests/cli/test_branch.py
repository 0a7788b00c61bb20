"""`dptrain branch` on a small run: real branches from real checkpoints, compared, taken up again, and refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dptrain.cli.branch import _parser, branch, branch_arguments, trunks
from dptrain.errors import ConfigError
from dptrain.tracking.jsonl import read_rows
from dptrain.train import CheckpointConfig, ControlConfig, Trainer
from tests.runs import make_config, noisy


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("branch") / "run"
    checkpoint = CheckpointConfig(every_samples=40, keep=10)
    control = ControlConfig(law="noise", min_gain=0.0, largest=16)
    Trainer(make_config(folder, max_samples=160, checkpoint=checkpoint, control=control), task=noisy).run()
    return folder


def steps_of(run):
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_branches_are_trained_compared_and_kept(run, capsys):
    """Each multiple of the batch in force trains on the window from the checkpoint; a second call trains nothing."""
    step = steps_of(run)[1]
    command = [str(run), f"--at={step}", "--multipliers=1,2", "--window-samples=64", "--tolerance=10", "--cpu"]
    assert branch(command) == 0
    (found,) = json.loads((run / "branches" / "branch.json").read_text())["branches"]
    reported = {row["step"]: row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"}
    row, following, batch = reported[step], reported[step + 1], found["global_batch_size"]
    assert (batch, found["learning_rate"]) == (following["batch/global"], pytest.approx(following["train/lr"]))
    assert (found["critical_batch_size"], found["is_open"]) == (2 * batch, True)
    for multiple in (1, 2):
        rows = read_rows(run / "branches" / f"step-{step}" / f"x{multiple}" / "metrics.jsonl")
        trained = [other for other in rows if other["kind"] == "train"]
        assert trained[0]["progress/samples"] == row["progress/samples"] + multiple * batch
        assert trained[-1]["progress/samples"] == row["progress/samples"] + 64
        assert {other["train/lr"] for other in trained} == {found["learning_rate"] * multiple**0.5}
    capsys.readouterr()
    assert branch(command) == 0
    assert "samples\n" not in capsys.readouterr().out, "nothing was trained again"


def test_what_cannot_be_branched_is_refused(run, tmp_path):
    """No run, and no such checkpoint: a sentence each."""
    with pytest.raises(ConfigError, match="not a run folder"):
        branch([str(tmp_path), "--window-samples=8"])
    with pytest.raises(ConfigError, match="no checkpoint of step 9999"):
        branch([str(run), "--at=9999", "--window-samples=8"])


def test_the_settings_of_the_run_are_kept_but_for_batch_rate_and_window(run):
    """The command line of a branch starts from the run's own settings file."""
    options = _parser().parse_args([str(run), "--window-samples=64", "--rule=linear"])
    (trunk,) = trunks(run, steps=None)
    arguments = branch_arguments(trunk, multiple=4, options=SimpleNamespace(**vars(options)), folder=run / "other")
    assert f"--config={run / 'config.yaml'}" in arguments
    assert f"--global_batch_size={4 * trunk.global_batch_size}" in arguments
    assert f"--optimizer.learning_rate={4 * trunk.learning_rate}" in arguments
