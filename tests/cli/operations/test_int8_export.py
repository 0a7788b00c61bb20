"""`dptrain export --int8`: what a reader gets, what the held-out loss becomes, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from dptrain.checkpoint.store import load_newest
from dptrain.cli.export import export
from dptrain.errors import ConfigError
from dptrain.models.settings import ModelConfig
from dptrain.tasks import Suggestion, Task, resolve_task
from dptrain.train import ControlConfig, LogConfig, TrainConfig, Trainer


def settings(folder, **more):
    """Settings of a short run."""
    return TrainConfig(
        **{
            "task": "digits",
            "run_dir": str(folder),
            "device": "cpu",
            "max_samples": 640,
            "global_batch_size": 16,
            "micro_batch_size": 8,
            "control": ControlConfig(law="constant", mode="off"),
            "log": LogConfig(tracker="none"),
            **more,
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of the MLP on the digits."""
    folder = tmp_path_factory.mktemp("int8") / "run"
    Trainer(settings(folder)).run()
    return folder


def losses_of(text):
    """Held-out loss before and after, as they were told."""
    before, _, after = text.rpartition("held-out loss: ")[2].partition(" → ")
    return float(before), float(after.split()[0])


def test_a_reader_gets_the_weights_to_half_a_step_and_the_loss_that_was_told(run, tmp_path, capsys):
    """Int8 times its scale is near the weight, and a model with the products has the second of the two losses.

    The first is that of the run's own summary. The file is a quarter of the size, and says what its numbers mean.
    """
    assert export([str(run), "--to", str(tmp_path / "w.safetensors"), "--int8"]) == 0
    before, after = losses_of(capsys.readouterr().out)
    assert before == pytest.approx(json.loads((run / "summary.json").read_text())["eval_loss"], rel=1e-5)
    tensors = load_file(tmp_path / "w.safetensors")
    saved = load_newest(run / "checkpoints").tensors("model")
    scales = {name: tensors.pop(f"{name}_scale") for name in list(saved) if f"{name}_scale" in tensors}
    assert set(scales) == {name for name, tensor in saved.items() if tensor.dim() > 1}
    assert tensors.keys() == saved.keys()
    for name, scale in scales.items():
        assert tensors[name].dtype == torch.int8
        tensors[name] = tensors[name].float() * scale[:, None]
        assert bool(((tensors[name] - saved[name]).abs() <= 0.5001 * scale[:, None]).all())
    task = resolve_task("digits")
    task.model.load_state_dict(tensors)
    loss = task.loss(task.model.eval(), task.eval_data.tensors).item()
    assert loss == pytest.approx(after, rel=1e-4)
    assert loss != pytest.approx(before, rel=1e-6)
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert "weight_scale" in file.metadata()["int8"]
    export([str(run), "--to", str(tmp_path / "plain.safetensors")])
    assert (tmp_path / "w.safetensors").stat().st_size < 0.4 * (tmp_path / "plain.safetensors").stat().st_size


def test_a_run_can_start_from_it(run, tmp_path, capsys):
    """`--from` takes the products; read as plain numbers, weights would be hundreds of times too large."""
    export([str(run), "--to", str(tmp_path / "w.safetensors"), "--int8"])
    _, after = losses_of(capsys.readouterr().out)
    names = [name for name, _ in resolve_task("digits").model.named_parameters()]
    one = settings(
        tmp_path / "next",
        max_samples=16,
        model=ModelConfig(weights=str(tmp_path / "w.safetensors"), freeze=",".join(names[:-1])),
    )
    assert Trainer(one).run()["eval_loss"] == pytest.approx(after, rel=0.05)


def test_a_run_in_few_bits_is_told_apart(tmp_path, capsys):
    """Both losses are in full precision, and the line says that the run's own are not."""
    Trainer(settings(tmp_path / "run", max_samples=160, model=ModelConfig(quantize="int3"))).run()
    export([str(tmp_path / "run"), "--to", str(tmp_path / "w.safetensors"), "--int8"])
    said = capsys.readouterr().out
    own = json.loads((tmp_path / "run" / "summary.json").read_text())["eval_loss"]
    assert "in full precision (the run's own figures are of model.quantize=int3)" in said
    assert losses_of(said)[0] != pytest.approx(own, rel=1e-3)


def test_a_run_of_bfloat16_parameters_is_rounded_and_measured(tmp_path, capsys):
    """The task's model is in float32, and takes what the run holds in bfloat16."""
    Trainer(settings(tmp_path / "run", max_samples=160, precision="bf16_parameters")).run()
    export([str(tmp_path / "run"), "--to", str(tmp_path / "w.safetensors"), "--int8"])
    own = json.loads((tmp_path / "run" / "summary.json").read_text())["eval_loss"]
    assert losses_of(capsys.readouterr().out) == pytest.approx((own, own), rel=0.02)


def bare(*, layers=True):
    """A task without held-out data, and without layers where that is asked for."""
    return Task(
        name="bare",
        model=nn.Linear(2, 1) if layers else nn.LayerNorm(2),
        train_data=TensorDataset(torch.randn(32, 2)),
        loss=lambda model, batch: model(batch[0]).square().mean(),
        suggestion=Suggestion(
            learning_rate=0.01, global_batch_size=4, micro_batch_size=2, max_samples=16, eval_every_samples=8
        ),
    )


def test_what_cannot_be_measured_or_rounded_is_said(tmp_path, capsys):
    """Without held-out data no loss is told; without layers, or without the task, the export is refused."""
    for name, options in (("run", {}), ("none", {"layers": False})):
        config = settings(tmp_path / name, task=f"{__file__}:bare", task_options=options, max_samples=32)
        Trainer(config).run()
    export([str(tmp_path / "run"), "--to", str(tmp_path / "w"), "--int8"])
    assert "held-out loss: not measured" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no linear or convolutional layers: export it without --int8"):
        export([str(tmp_path / "none"), "--to", str(tmp_path / "x"), "--int8"])
    with pytest.raises(ConfigError, match="--int8 is about weights"):
        export([str(tmp_path / "run"), "--metrics", str(tmp_path / "m.csv"), "--int8"])
    assert not (tmp_path / "x").exists()
