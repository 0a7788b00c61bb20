"""Fine-tuning: what starts from weights, what is trained, what the meter sees of it, and that it survives a kill."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dptrain
from dptrain.checkpoint.store import load_newest
from dptrain.cli.export import export
from dptrain.cli.settings import parse
from dptrain.errors import ConfigError
from dptrain.models.adaptation import adapt_model, merge_adapters
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.models.settings import ModelConfig
from dptrain.tasks import resolve_task
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, OptimizerConfig, TrainConfig, Trainer
from dptrain.train.preparation import prepared
from dptrain.train.preparation.saved_task import saved_task
from dptrain.train.preparation.weights import read_weights
from tests.runs import Killed, assert_same, attempt, result_of

FEW = {"model": "cnn", "classes": "5-9", "num_train": 60}
LORA = {"lora_rank": 2, "lora_targets": "1,3,5"}
KINDS = {
    "all": {},
    "by layer": {"layer_decay": 0.5},
    "head": {"freeze": "*"},
    "frozen": {"freeze": "1.*,3.*"},
    "lora": LORA,
}


def settings(folder, **more):
    """Settings of a short run on five classes of mnist1d."""
    return TrainConfig(
        **{
            "task": "mnist1d",
            "task_options": FEW,
            "run_dir": str(folder),
            "device": "cpu",
            "max_samples": 160,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "control": ControlConfig(law="constant"),
            "checkpoint": CheckpointConfig(every_samples=48),
            "noise": NoiseConfig(every=1),
            "log": LogConfig(tracker="none"),
            **more,
        }
    )


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """The folder of a run on the other five classes."""
    folder = tmp_path_factory.mktemp("others") / "run"
    Trainer(settings(folder, task_options={"model": "cnn", "classes": "0-4"})).run()
    return folder


def tuned(folder, others, kind):
    """Settings that start from it with a new head."""
    return settings(folder, model=ModelConfig(weights=str(others), new_head="8.*", **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_starts_from_a_run_with_a_new_head(tmp_path, others, kind):
    """The body is the other run's and the head is the task's own; what is trained is what the settings say."""
    torch.manual_seed(0)
    fresh = resolve_task("mnist1d", options=FEW)
    torch.manual_seed(0)
    task, _ = prepared(resolve_task("mnist1d", options=FEW), tuned(tmp_path, others, kind))
    saved = load_newest(others / "checkpoints").tensors("model")
    for name, tensor in task.model.state_dict().items():
        plain = name.replace(".base_layer", "")
        if "lora_" not in name:
            source = fresh.model.state_dict() if name.startswith("8.") else saved
            assert torch.equal(tensor, source[plain])
    trained = {name for name, p in task.model.named_parameters() if p.requires_grad}
    assert {"8.weight", "8.bias"} <= trained
    others_trained = trained - {"8.weight", "8.bias"}
    expected = {"all": 6, "by layer": 6, "head": 0, "frozen": 2, "lora": 6}[kind]
    assert len(others_trained) == expected
    assert kind != "lora" or all("lora_" in name for name in others_trained)


@pytest.mark.parametrize("kind", KINDS)
def test_the_meter_sees_what_is_trained_alone(tmp_path, others, kind):
    """|G|² and tr(Σ) of one step over all samples are those of every sample's own gradient, to 0.01 %."""
    torch.manual_seed(0)
    task, _ = prepared(resolve_task("mnist1d", options=FEW), tuned(tmp_path, others, kind))
    for name, parameter in task.model.named_parameters():
        if "lora_B" in name:  # it begins at zero, where half of the adapters have no gradient
            parameter.data = 0.1 * torch.randn_like(parameter)
    signals, classes = task.train_data.tensors
    count = len(classes)
    with dptrain.attach(task.model, every=1) as meter:
        for sample in range(count):
            meter.begin(num_samples=1, weight=1 / count)
            (task.loss(task.model, (signals[[sample]], classes[[sample]])) / count).backward()
        meter.step()
        scale = meter.read()
    trained = {name: p.detach() for name, p in task.model.named_parameters() if p.requires_grad}

    def loss(parameters, signal, label):
        def call(inputs):
            return torch.func.functional_call(task.model, parameters, (inputs,))

        return task.loss(call, (signal[None], label[None]))

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(trained, signals, classes)
    flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1).double()
    trace = float(flat.var(0).sum())
    square = float(flat.mean(0).square().sum()) - trace / count
    assert (scale.noise_trace, scale.grad_sq_norm) == pytest.approx((trace, square), rel=1e-4)


@pytest.mark.parametrize("kind", ["by layer", "lora"])
def test_fine_tuning_is_resumed_bit_for_bit(tmp_path, others, kind):
    """Killed and resumed, it ends with the same bytes; frozen weights are those that it started from."""
    attempt(tmp_path / "whole", config=tuned(tmp_path / "whole", others, kind), task="mnist1d")
    config = tuned(tmp_path / "killed", others, kind)
    with pytest.raises(Killed):
        attempt(tmp_path / "killed", kill_at=8, config=config, task="mnist1d")
    # What is left open is as it was saved, and the weights that it started from may be gone.
    moved = others.rename(tmp_path / "moved")
    try:
        Trainer(settings(tmp_path / "killed"), resume=True).run()
    finally:
        moved.rename(others)
    assert_same(result_of(tmp_path / "killed"), result_of(tmp_path / "whole"))
    saved = load_newest(others / "checkpoints").tensors("model")
    found = load_newest(tmp_path / "whole" / "checkpoints").tensors("model")
    name = "1.base_layer.weight" if kind == "lora" else "1.weight"
    assert torch.equal(found[name], saved["1.weight"]) == (kind == "lora")


def test_a_head_of_another_size_is_refused_with_what_to_write(tmp_path, others):
    """Without a new head, the refusal names the tensors that do not fit and the setting."""
    task = resolve_task("mnist1d", options={"model": "cnn", "classes": "5-8"})
    with pytest.raises(
        ConfigError, match=r"another shape 8\.weight, 8\.bias: what is to begin anew is model\.new_head"
    ):
        prepared(task, settings(tmp_path, model=ModelConfig(weights=str(others))))


def test_short_names_are_those_of_the_settings():
    """`--from` and `--teacher` on the command line, with a space or an equals sign."""
    config, _ = parse(["--from", "runs/one", "--teacher=runs/two"])
    assert (config.model.weights, config.distillation.teacher) == ("runs/one", "runs/two")


def test_what_leaves_nothing_to_do_is_refused(tmp_path):
    """All frozen, or a new head of a model that is new as a whole: each in one sentence."""
    task = resolve_task("mnist1d", options=FEW)
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        prepared(task, settings(tmp_path, model=ModelConfig(freeze="*")))
    with pytest.raises(ConfigError, match="the whole model is new"):
        prepared(task, settings(tmp_path, model=ModelConfig(new_head="8.*")))


def test_adapters_are_merged_for_whoever_reads_the_run(tmp_path, others):
    """A model of the task without adapters computes what the run's does, from `--from`, an export and one in int8."""
    config = replace(tuned(tmp_path / "run", others, "lora"), optimizer=OptimizerConfig(learning_rate=0.05))
    Trainer(config).run()
    saved = load_newest(tmp_path / "run" / "checkpoints")
    trained = saved_task(saved, what="it", tensors=saved.tensors("model")).model.eval()
    signals = torch.stack([resolve_task("mnist1d", options=FEW).train_data[index][0] for index in range(8)])
    export([str(tmp_path / "run"), "--to", str(tmp_path / "w.safetensors")])
    export([str(tmp_path / "run"), "--to", str(tmp_path / "int8.safetensors"), "--int8"])
    before = torch.random.get_rng_state()
    read_weights(tmp_path / "run")
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        expected = trained(signals)
        for source in ("run", "w.safetensors", "int8.safetensors"):
            start = settings(tmp_path / "next", model=ModelConfig(weights=str(tmp_path / source)))
            task, _ = prepared(resolve_task("mnist1d", options=FEW), start)
            found = task.model.eval()(signals)
            tolerance = 0.05 if source.startswith("int8") else 1e-5
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    # The adapters did something that could be lost.
    base = {name.replace(".base_layer", ""): t for name, t in saved.tensors("model").items() if ".lora_" not in name}
    task.model.load_state_dict(base)
    assert not torch.allclose(task.model(signals), expected, rtol=1e-3)


def test_adapters_of_a_tied_weight_are_not_merged():
    """The embedding would change with the output."""
    model = Gpt(GptConfig(vocab_size=8, context=4, width=8, depth=1, heads=1, tied=True))
    adapt_model(model, ModelConfig(lora_rank=1, lora_targets="output"))
    with pytest.raises(ConfigError, match=r"adapters of output cannot be merged: its weight is embedding\.weight"):
        merge_adapters(model)
