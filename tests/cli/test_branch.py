"""`dptrain branch` on a small run: real branches from real checkpoints, compared, taken up again, and refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from dptrain.checkpoint.store import load_checkpoint
from dptrain.cli.branch import _parser, _place, _train, branch, branch_arguments, trunks
from dptrain.cli.settings import parse
from dptrain.config.settings_file import build_config, read_settings
from dptrain.control.batch_scaling import adam_betas
from dptrain.errors import ConfigError
from dptrain.sweep.child_runs import Site
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import write_config
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


def test_a_branch_with_other_settings_is_no_answer(run, tmp_path):
    """Its loss is not taken for that of another window, rule or run, and a half-done one does not go on: a sentence."""
    out = tmp_path / "out"
    options = _parser().parse_args([str(run), "--window-samples=64", "--multipliers=1", f"--out={out}", "--cpu"])
    (trunk,) = trunks(run, steps=None)
    folder = out / f"step-{trunk.step}" / "x2"
    folder.mkdir(parents=True)
    config, _ = parse(branch_arguments(trunk, multiple=2, options=options, folder=folder)[1:])
    write_config(folder / "config.yaml", config)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "summary.json").write_text('{"eval_loss": 0.5}')
    site = Site.here(num_parallel=1, num_replicas=1, cpu=True)

    def ask(*more):
        asked = _parser().parse_args([str(run), f"--out={out}", "--cpu", *more])
        return _train(trunk, multiple=2, options=asked, out=out, site=site)

    assert ask("--window-samples=64") == ask("--window-samples=64", "--replicas=2") == 0.5
    last, rate = trunk.position + 64, trunk.learning_rate
    with pytest.raises(ConfigError, match=f"max_samples {last} and not {last + 8}: give another --out"):
        ask("--window-samples=72")
    with pytest.raises(ConfigError, match=f"learning_rate {rate * 2**0.5} and not {rate * 2}: give"):
        ask("--window-samples=64", "--rule=linear")
    (folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match="give another --out"):
        ask("--window-samples=72")


def branch_of(run, tmp_path, *flags, **changes):
    """Return the settings of a branch of the run, had that these settings, and the moment that it is from."""
    config = read_settings(run / "config.yaml")
    for name, change in changes.items():
        config[name] = {**config[name], **change} if isinstance(change, dict) else change
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    write_config(folder / "config.yaml", build_config(config))
    options = _parser().parse_args([str(folder), "--window-samples=64", "--rule=none", *flags])
    (trunk,) = trunks(folder, steps=None)
    return parse(branch_arguments(trunk, multiple=2, options=options, folder=tmp_path / "branch")[1:])[0], trunk


def test_a_run_whose_law_has_options_can_be_branched(run, tmp_path):
    """The options belong to a law that the branch does not have."""
    config, _ = branch_of(run, tmp_path, control={"law_options": {"ratio": 4.0}})
    assert config.control.law_options == {}


def test_a_branch_holds_what_is_in_force(run, tmp_path):
    """Rate, betas and weight decay at the batch and the factor of that moment; no rule and no preset moves them."""
    rules = {"rule": "root_gain", "beta_rule": "half_life", "decay_rule": "timescale"}
    tuned = {"preset": "per_sample", "reference_batch_size": 2, **rules}
    config, trunk = branch_of(run, tmp_path, optimizer={**tuned, "weight_decay": 0.1})
    assert trunk.global_batch_size > 2, "the rules have something to follow"
    state = load_checkpoint(trunk.path).state["progress"]
    optimizer, batch = config.optimizer, trunk.global_batch_size
    assert optimizer.preset is None
    assert {getattr(optimizer, name) for name in rules} == {"none"}
    expected = adam_betas("half_life", (0.9, 0.95), batch=batch, reference_batch=2)
    assert (optimizer.beta1, optimizer.beta2) == (expected.beta1, expected.beta2) != (0.9, 0.95)
    assert optimizer.weight_decay == pytest.approx(0.1 * batch / 2 / state["learning_rate_factor"])
    assert optimizer.learning_rate == trunk.learning_rate


@pytest.mark.parametrize(("flags", "device"), [(["--cpu"], "cpu"), ([], "auto")])
def test_gpus_are_left_alone_in_the_branches_too(run, tmp_path, flags, device):
    """They are told so, where they begin and where they go on: a branch counts the GPUs itself."""
    config, _ = branch_of(run, tmp_path, *flags, device="auto")
    assert config.device == device
    options = _parser().parse_args([str(run), "--window-samples=64", *flags])
    assert _place(options) == ["--replicas=1", *(["--device=cpu"] if flags else [])]


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
