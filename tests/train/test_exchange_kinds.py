"""The trainer under every kind of exchange: killed and resumed, on other replicas, evaluated, and exported."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dptrain.checkpoint.store import load_newest
from dptrain.cli.export import export
from dptrain.errors import ConfigError, TaskError
from dptrain.exchange import ExchangeConfig
from dptrain.models.settings import SparsityConfig
from dptrain.tracking.jsonl import read_rows
from dptrain.train import ControlConfig, OptimizerConfig, TrainConfig, Trainer
from tests.replicas import run_replicas
from tests.runs import Killed, attempt, make_config, noisy

KINDS = {
    "all_reduce": ExchangeConfig(),
    "bf16": ExchangeConfig(kind="compressed"),
    "int8": ExchangeConfig(kind="compressed", codec="int8"),
    "powersgd": ExchangeConfig(kind="compressed", codec="powersgd", rank=1),
    "random_bases": ExchangeConfig(kind="random_bases", dimensions=10),
    "local": ExchangeConfig(kind="local_updates", every=7),
    "overlapped": ExchangeConfig(kind="local_updates", every=7, outer="nesterov", overlap=3),
    "codistillation": ExchangeConfig(kind="codistillation", staleness=3),
    "ensemble": ExchangeConfig(kind="ensemble"),
    "weight 0": ExchangeConfig(kind="codistillation", weight=0.0),
}
APART = ("local", "overlapped", "codistillation", "ensemble", "weight 0")
FOLLOWING = ("all_reduce", "bf16", "int8")
"""Kinds whose batch follows the noise scale, so that their runs have fewer steps than the 57 of the others."""
KILLED_AT = {name: random.Random(name).randrange(10, 24 if name in FOLLOWING else 56) for name in KINDS}
"""Steps, drawn at random; checkpoints are saved in steps 5, 11, 17, 23, … of the longer runs."""
KILLED_AT["overlapped"] = 33  # it goes on from step 29, with the exchange of steps 28 to 31 under way


def config_of(folder, name, **settings):
    constant = {"law": "constant"} if name not in FOLLOWING else {"law": "noise", "largest": 16}
    return replace(make_config(folder, control=ControlConfig(**constant)), exchange=KINDS[name], **settings)


def model_files(folder):
    saved = load_newest(Path(folder) / "checkpoints")
    return {path.name: path.read_bytes() for path in sorted(saved.path.glob("*.safetensors"))}


def train_all(rank, world_size, folder):
    found = {}
    for name in KINDS:
        for run in ("whole", "cut"):
            run_dir = Path(folder) / name / run
            config = config_of(run_dir, name)
            if run == "cut":
                with pytest.raises(Killed):
                    attempt(run_dir, kill_at=KILLED_AT[name], config=config)
                torch.distributed.barrier()
                saved = load_newest(run_dir / "checkpoints").state
                found[name] = {"step": saved["progress"]["step"], "exchange": saved["exchange"]}
                torch.distributed.barrier()
            attempt(run_dir, config=config)
            torch.distributed.barrier()
    whole = Path(folder) / "local" / "whole"
    trainer = Trainer(config_of(whole, "local"), task=noisy, resume=True)
    trainer._state.begin(trainer._saved, None, _Silent())
    with trainer._exchange.evaluating(trainer._bare_model) as (model, _):
        found["averaged"] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return found


class _Silent:
    def note(self, text):
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    return folder, run_replicas(train_all, world_size=2, args=(folder,), timeout_s=400)


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_run_ends_with_the_same_bytes(runs, name):
    """Parameters, optimizers and what a kind remembers, of every replica, are those of the run that nobody killed."""
    folder, _ = runs
    whole, cut = (model_files(folder / name / run) for run in ("whole", "cut"))
    assert whole == cut
    assert ("model-1.safetensors" in whole) == (name in APART)
    assert ("exchange-1.safetensors" in whole) == (name in ("bf16", "int8", "powersgd", "overlapped"))


@pytest.mark.parametrize("name", KINDS)
def test_each_sample_is_trained_once(runs, name):
    """The windows of a killed run follow on one another from the first sample to the last."""
    folder, _ = runs
    for run in ("whole", "cut"):
        rows = [row for row in read_rows(folder / name / run / "metrics.jsonl") if row["kind"] == "train"]
        ends = [row["progress/samples"] for row in rows]
        assert [end - row["batch/global"] for end, row in zip(ends, rows, strict=True)] == [0, *ends[:-1]]
        assert ends[-1] == 230


def test_runs_are_killed_with_something_to_remember(runs):
    """Each goes on from a checkpoint, between two exchanges, with an exchange or with predictions under way."""
    _, (found, _) = runs
    for name, killed_at in KILLED_AT.items():
        assert 0 < found[name]["step"] <= killed_at
    assert found["overlapped"]["exchange"] == {"steps": 29, "due": 31}
    assert found["local"]["exchange"]["steps"] % 7
    assert found["codistillation"]["exchange"]["step"] >= 3  # the staleness: from then on as many wait


def test_decisions_hold_where_there_is_a_noise_scale(runs):
    """Under compressed gradients the batch follows the noise scale as under exact ones, killed or not."""
    folder, _ = runs
    for name in ("bf16", "int8"):
        whole, cut = (read_rows(folder / name / run / "decisions.jsonl") for run in ("whole", "cut"))
        assert whole == cut
        assert [row["batch/after"] for row in whole] == [
            row["batch/after"] for row in read_rows(folder / "all_reduce" / "whole" / "decisions.jsonl")
        ]


def test_weight_0_is_the_ensemble(runs):
    """Codistillation without a weight trains the very members of the ensemble."""
    folder, _ = runs
    one, two = (model_files(folder / name / "whole") for name in ("ensemble", "weight 0"))
    for name in ("model.safetensors", "model-1.safetensors", "optimizer-1.safetensors"):
        assert one[name] == two[name]
    assert one["model.safetensors"] != one["model-1.safetensors"]
    assert model_files(folder / "codistillation" / "whole")["model.safetensors"] != one["model.safetensors"]


def test_what_is_sent_is_in_log_and_summary(runs):
    """49 parameters of 4 bytes to one other replica: all, a quarter with 4 scales, every seventh step, or none."""
    folder, _ = runs
    sent = {name: json.loads((folder / name / "whole" / "summary.json").read_text()) for name in KINDS}
    assert sent["all_reduce"]["bytes_per_step"] == 4 * 49
    assert sent["int8"]["bytes_per_step"] == 49 + 4 * 4
    assert sent["local"]["bytes_per_step"] == pytest.approx(4 * 49 / 7)
    assert sent["codistillation"]["bytes_per_step"] == 4 * 2
    assert sent["ensemble"]["bytes_sent"] == 0
    for name in ("all_reduce", "bf16", "local"):
        assert sent[name]["bytes_sent"] == pytest.approx(sent[name]["steps"] * sent[name]["bytes_per_step"])


def test_export_writes_average_one_or_all(runs, tmp_path, capsys):
    """Of local updates the mean by default, which is what was evaluated; of members that are models only by name."""
    from safetensors.torch import load_file

    folder, (found, _) = runs
    run = str(folder / "local" / "whole")
    export([run, "--to", str(tmp_path / "mean.safetensors")])
    export([run, "--to", str(tmp_path / "one.safetensors"), "--member", "1"])
    export([run, "--to", str(tmp_path / "each.safetensors"), "--member", "all"])
    mean, one, first, second = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("mean", "one", "each-0", "each-1")
    )
    for name, value in mean.items():
        assert torch.equal(one[name], second[name])
        assert torch.allclose(value, (first[name] + second[name]) / 2)
        assert not torch.equal(first[name], second[name])
    order = [name for name, _ in noisy().model.named_parameters()]
    assert torch.allclose(torch.cat([mean[name].flatten() for name in order]), torch.tensor(found["averaged"]))
    with pytest.raises(ConfigError, match="--member all"):
        export([str(folder / "ensemble" / "whole"), "--to", str(tmp_path / "ensemble.safetensors")])
    with pytest.raises(ConfigError, match="from 0 to 1, got 2"):
        export([run, "--to", str(tmp_path / "two.safetensors"), "--member", "2"])


@pytest.mark.parametrize("name", ["random_bases", *APART])
def test_another_number_of_replicas_is_refused(runs, name):
    """One process cannot go on for two replicas that each had something of its own; the error says what to do."""
    folder, _ = runs
    run_dir = folder / name / "cut"
    with pytest.raises(ConfigError, match=r"saved by 2 replicas and there are 1.*go on with 2"):
        Trainer(config_of(run_dir, name), task=noisy, resume=True).run()


def test_compressed_gradients_go_on_with_one_replica(tmp_path):
    """What two replicas have lost is not lost to one, which needs no codec: within 1 % of the run on two."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_replicas(train_and_cut, world_size=2, args=(whole, cut), timeout_s=120)
    Trainer(resumable(cut), task=noisy, resume=True).run()
    one, two = (load_newest(run / "checkpoints").tensors("model") for run in (whole, cut))
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=0.01, atol=1e-3)


CODECS = ("bf16", "int8", "powersgd")


def test_compressed_gradients_go_on_with_more_replicas(tmp_path):
    """Three replicas share what two have lost: within 1 % of the run on two, and each sample is trained once."""
    run_replicas(cut_each, world_size=2, args=(tmp_path,), timeout_s=240)
    run_replicas(resume_each, world_size=3, args=(tmp_path,), timeout_s=240)
    for name in CODECS:
        one, two = (load_newest(tmp_path / name / run / "checkpoints").tensors("model") for run in ("whole", "cut"))
        for key, value in one.items():
            assert torch.allclose(value, two[key], rtol=0.01, atol=1e-3), name
        assert any(not torch.equal(value, two[key]) for key, value in one.items())
        rows = [row for row in read_rows(tmp_path / name / "cut" / "metrics.jsonl") if row["kind"] == "train"]
        ends = [row["progress/samples"] for row in rows]
        assert [end - row["batch/global"] for end, row in zip(ends, rows, strict=True)] == [0, *ends[:-1]]
        assert ends[-1] == 230


def cut_each(rank, world_size, folder):
    for name in CODECS:
        attempt(folder / name / "whole", config=config_of(folder / name / "whole", name, layout_replicas=2))
        torch.distributed.barrier()
        with pytest.raises(Killed):
            attempt(folder / name / "cut", kill_at=15, config=config_of(folder / name / "cut", name, layout_replicas=2))
        torch.distributed.barrier()


def resume_each(rank, world_size, folder):
    for name in CODECS:
        attempt(folder / name / "cut", config=config_of(folder / name / "cut", name, layout_replicas=2))
        torch.distributed.barrier()


def resumable(folder):
    return config_of(folder, "int8", layout_replicas=2)


def train_and_cut(rank, world_size, whole, cut):
    attempt(whole, config=resumable(whole))
    with pytest.raises(Killed):
        attempt(cut, kill_at=15, config=resumable(cut))


def single(folder, kind):
    config = config_of(folder, kind)
    Trainer(config, task=noisy).run()
    return model_files(folder)["model.safetensors"]


def test_one_replica_is_the_single_model(tmp_path):
    """In one process every kind but random bases trains the model of all_reduce, to the last bit."""
    constant = make_config(tmp_path / "plain", control=ControlConfig(law="constant"))
    Trainer(constant, task=noisy).run()
    plain = model_files(tmp_path / "plain")["model.safetensors"]
    for name in ("powersgd", "local", "codistillation", "ensemble"):
        assert single(tmp_path / name, name) == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exchange": ExchangeConfig(kind="local_updates")}, "law=goodput needs the noise scale.*law=constant"),
        (
            {"exchange": ExchangeConfig(kind="ensemble"), "control": ControlConfig(mode="measure")},
            "mode=measure needs the noise scale",
        ),
        (
            {
                "exchange": ExchangeConfig(kind="random_bases"),
                "control": ControlConfig(law="schedule", schedule="0:4 100:8"),
            },
            "rule=square_root",
        ),
        ({"exchange": ExchangeConfig(every=3)}, "exchange.every is given.*for local_updates"),
        ({"exchange": ExchangeConfig(kind="compressed", rank=3)}, "rank is given"),
        ({"exchange": ExchangeConfig(kind="compressed", codec="powersgd")}, "needs the noise scale"),
        (
            {
                "exchange": ExchangeConfig(kind="ensemble"),
                "control": ControlConfig(law="constant"),
                "optimizer": OptimizerConfig(average_decay=0.9),
            },
            "average_decay",
        ),
        (
            {
                "exchange": ExchangeConfig(kind="local_updates"),
                "control": ControlConfig(law="constant"),
                "precision": "fp16",
            },
            "precision=bf16",
        ),
        *(
            (
                {
                    "exchange": ExchangeConfig(kind=kind),
                    "control": ControlConfig(law="constant"),
                    "sparsity": SparsityConfig(method="rigl", sparsity=0.5),
                },
                f"with exchange.kind={kind} .*sparsity.method=static",
            )
            for kind in ("ensemble", "codistillation", "local_updates")
        ),
        *(
            (
                {
                    "exchange": ExchangeConfig(kind=kind, codec=codec),
                    "control": ControlConfig(law="constant"),
                    "sparsity": SparsityConfig(method=method),
                },
                f"sparsity.method={method} has masked .*exchange.codec=int8",
            )
            for method in ("static", "rigl")
            for kind, codec in (("random_bases", None), ("compressed", "powersgd"))
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    """Before anything is trained, with the remedy."""
    with pytest.raises(ConfigError, match=message):
        TrainConfig(task="digits", **settings)


def test_batch_norms_are_refused_where_replicas_part(tmp_path):
    """Their statistics would be those of one replica."""

    def normed():
        task = noisy()
        return replace(task, model=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))

    with pytest.raises(TaskError, match=r"batch norms.*ensemble"):
        Trainer(config_of(tmp_path, "ensemble"), task=normed)
