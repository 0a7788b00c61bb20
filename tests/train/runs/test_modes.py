"""The four modes of control on real replicas, and a length in steps: what each changes, writes and refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dptrain.errors import ConfigError
from dptrain.tracking.jsonl import read_rows
from dptrain.train import ControlConfig, NoiseConfig, TrainConfig, Trainer
from tests.replicas import run_replicas
from tests.runs import make_config, noisy

EAGER = ControlConfig(law="noise", min_gain=0.0, largest=16)


def train(folder, **settings):
    trainer = Trainer(make_config(folder, max_samples=160, **settings), task=noisy)
    summary = trainer.run()
    return torch.cat([p.detach().flatten() for p in trainer._bare_model.parameters()]).tolist(), summary


def in_mode(rank, world_size, folder):
    """Train once in each mode, and once with a batch that is constant by its law."""
    settings = {mode: replace(EAGER, mode=mode) for mode in ("off", "measure", "advise", "adapt")}
    settings["constant"] = ControlConfig(law="constant")
    return {name: train(f"{folder}/{name}", control=control) for name, control in settings.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    return folder, run_replicas(in_mode, world_size=2, args=(str(folder),))[0]


def rows(folder, mode):
    return [row for row in read_rows(folder / mode / "metrics.jsonl") if row["kind"] == "train"]


@pytest.mark.parametrize("mode", ["off", "measure", "advise"])
def test_only_adapt_changes_the_training(runs, mode):
    """Parameters are those of a constant batch to the last bit, and so are batches and rates."""
    folder, found = runs
    assert found[mode][0] == found["constant"][0]
    reported = ("batch/global", "train/lr", "train/loss", "train/grad_norm")
    assert [[row[key] for key in reported] for row in rows(folder, mode)] == [
        [row[key] for key in reported] for row in rows(folder, "constant")
    ]


def test_adapt_is_what_the_others_are_not(runs):
    """The same law, acted upon, moves the batch and so trains something else."""
    folder, found = runs
    assert found["adapt"][1]["num_batch_changes"] > 0
    assert found["adapt"][0] != found["constant"][0]
    assert all(row["applied"] for row in read_rows(folder / "adapt" / "decisions.jsonl"))


def test_advice_is_written_with_its_reason_and_once(runs):
    """Each row of advice differs from the one before it, says why, and says that it was not acted upon."""
    folder, found = runs
    advice = read_rows(folder / "advise" / "decisions.jsonl")
    assert advice
    assert not any(row["applied"] for row in advice)
    assert all(row["reason"] for row in advice)
    batches = [4, *(row["batch/after"] for row in advice)]
    assert all(before != after for before, after in pairwise(batches))
    assert found["advise"][1]["num_batch_changes"] == 0


def test_off_measures_nothing_and_measure_decides_nothing(runs):
    """Without a meter there is no noise scale; with one and no more there are no decisions."""
    folder, found = runs
    assert not any(key.startswith("noise_scale/") for row in rows(folder, "off") for key in row)
    assert found["off"][1]["noise_scale"] is None
    assert rows(folder, "measure")[-1]["noise_scale/effective_steps"] > 1
    assert not any(read_rows(folder / mode / "decisions.jsonl") for mode in ("off", "measure"))


def test_parts_of_the_model_are_measured_and_add_up(tmp_path):
    """With noise.groups each module has columns of its own; training does not see it."""
    plain, _ = train(tmp_path / "plain", control=ControlConfig(law="constant"))
    grouped, _ = train(
        tmp_path / "groups", control=ControlConfig(law="constant"), noise=NoiseConfig(groups=True, every=1)
    )
    assert plain == grouped
    last, whole = rows(tmp_path, "groups")[-1], rows(tmp_path, "plain")[-1]
    names = {key.split("/")[1] for key in last if key.count("/") == 2 and key.startswith("noise_scale/")}
    assert names
    assert all(
        {f"noise_scale/{name}/value", f"noise_scale/{name}/lower", f"noise_scale/{name}/upper"} <= set(last)
        for name in names
    )
    assert last["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-6)
    assert last["noise_scale/trace"] == pytest.approx(whole["noise_scale/trace"], rel=1e-6)


def test_a_length_in_steps_belongs_to_a_batch_that_stays():
    """With an adaptive batch it is refused, with what to write instead; with a constant one it is a length."""
    with pytest.raises(ConfigError, match=r"write max_samples=3200"):
        TrainConfig(max_steps=100, global_batch_size=32)
    with pytest.raises(ConfigError, match="leave one out"):
        TrainConfig(max_steps=100, max_samples=5, global_batch_size=32, control=ControlConfig(law="constant"))
    TrainConfig(max_steps=100, global_batch_size=32, control=ControlConfig(mode="measure"))


def test_a_length_in_steps_is_trained(tmp_path):
    """A run of 7 steps has 7 steps."""
    _, summary = train_steps(tmp_path / "run", max_steps=7)
    assert summary["steps"] == 7


def train_steps(folder, **settings):
    trainer = Trainer(make_config(folder, control=ControlConfig(law="constant"), **settings), task=noisy)
    return trainer, trainer.run()
