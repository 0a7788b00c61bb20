"""Training in few bits: what the meter sees of it, that it survives a kill, several replicas, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import dptrain
from dptrain.config.execution import ExecutionConfig
from dptrain.errors import ConfigError
from dptrain.models.settings import ModelConfig
from dptrain.tasks import resolve_task
from dptrain.tracking.jsonl import read_rows
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, TrainConfig, Trainer
from dptrain.train.preparation import prepared
from tests.replicas import run_replicas
from tests.runs import Killed, assert_same, attempt, result_of

# A power of two: its inverse is a factor that float32 has exactly. Gradients through few bits are often halfway between
# two numbers, and another factor decides by its last bit which of them they become (|G|² 1.7 % off in fp4 with 48).
NUM_SAMPLES, NUM_DRAWS = 64, 30


def settings(folder, **more):
    """Settings of a short run in four bits on the digits."""
    return TrainConfig(
        **{
            "task": "digits",
            "run_dir": str(folder),
            "device": "cpu",
            "max_samples": 160,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "layout_replicas": 2,
            "control": ControlConfig(law="constant"),
            "checkpoint": CheckpointConfig(every_samples=48),
            "noise": NoiseConfig(every=1),
            "log": LogConfig(tracker="none"),
            "model": ModelConfig(quantize="fp4", rounding="stochastic"),
            **more,
        }
    )


def in_few_bits(folder, *, quantize, rounding):
    """The task with its model in few bits, and the first of its samples."""
    torch.manual_seed(0)
    config = settings(folder, model=ModelConfig(quantize=quantize, rounding=rounding))
    task, _ = prepared(resolve_task("digits"), config)
    pixels, classes = task.train_data.tensors
    return task, pixels[:NUM_SAMPLES], classes[:NUM_SAMPLES]


def measured(task, pixels, classes, *, size):
    """|G|² and tr(Σ) of one step over the samples in micro-batches, as the meter reads them."""
    count = len(classes)
    with dptrain.attach(task.model, every=1) as meter:
        for start in range(0, count, size):
            part = slice(start, start + size)
            meter.begin(num_samples=size, weight=size / count)
            (task.loss(task.model, (pixels[part], classes[part])) * (size / count)).backward()
        meter.step()
        scale = meter.read()
    task.model.zero_grad()
    return scale.grad_sq_norm, scale.noise_trace


def gradients_of(task, pixels, classes):
    """The gradient of each sample alone, flat, in float64."""
    parameters = list(task.model.parameters())
    found = []
    for at in range(len(classes)):
        loss = task.loss(task.model, (pixels[[at]], classes[[at]]))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double())
    return torch.stack(found)


@pytest.mark.parametrize("quantize", ["fp8", "fp4", "int4"])
def test_the_meter_sees_the_gradients_of_the_quantised_model(tmp_path, quantize):
    """Rounded to the nearest, |G|² and tr(Σ) of one step are those of every sample's own gradient, to 1 %.

    Those of the model in float32 are others.
    """
    task, pixels, classes = in_few_bits(tmp_path, quantize=quantize, rounding="nearest")
    square, trace = measured(task, pixels, classes, size=1)
    gradients = gradients_of(task, pixels, classes)
    exact = float(gradients.var(0).sum())
    mean = float(gradients.mean(0).square().sum()) - exact / len(classes)
    assert (square, trace) == pytest.approx((mean, exact), rel=0.01)
    plain = resolve_task("digits")
    plain.model.load_state_dict(task.model.state_dict())
    assert float(gradients_of(plain, pixels, classes).var(0).sum()) != pytest.approx(exact, rel=1e-5)


def test_a_noise_scale_does_not_depend_on_the_micro_batch(tmp_path):
    """A mean over pairs of samples has the tr(Σ) that formula F3 gives from the same pairs' exact gradients, to 1 %.

    A scale over several samples would break that: the pair's gradient would not be the mean of the two.
    """
    task, pixels, classes = in_few_bits(tmp_path, quantize="int4", rounding="nearest")
    _, trace = measured(task, pixels, classes, size=2)
    pairs = gradients_of(task, pixels, classes).view(NUM_SAMPLES // 2, 2, -1).mean(1)
    assert trace == pytest.approx(2 * float(pairs.var(0).sum()), rel=0.01)


def test_rounding_by_chance_is_part_of_the_noise(tmp_path):
    """tr(Σ) is the covariance of samples' mean gradients plus the mean covariance of a sample's draws, to 4 %.

    The second part is more than a tenth of it here, so a meter that did not see it would fail.
    """
    task, pixels, classes = in_few_bits(tmp_path, quantize="int3", rounding="stochastic")
    draws = torch.stack([gradients_of(task, pixels, classes) for _ in range(NUM_DRAWS)])
    by_chance = float(draws.var(0).sum(-1).mean())
    # The mean of so many draws still has a part of their variance in it.
    of_samples = float(draws.mean(0).var(0).sum()) - by_chance / NUM_DRAWS
    assert by_chance > 0.1 * of_samples
    readings = [measured(task, pixels, classes, size=4)[1] for _ in range(NUM_DRAWS)]
    found = sum(readings) / NUM_DRAWS
    fours = draws.view(NUM_DRAWS, NUM_SAMPLES // 4, 4, -1).mean((0, 2))
    between = 4 * (float(fours.var(0).sum()) - by_chance / (4 * NUM_DRAWS))
    assert found == pytest.approx(between + by_chance, rel=0.04)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_run_in_few_bits_is_resumed_bit_for_bit(tmp_path, rounding):
    """Killed and resumed, it ends with the same bytes; with rounding by chance those are others than without."""
    model = ModelConfig(quantize="fp4", rounding=rounding)
    attempt(tmp_path / "whole", config=settings(tmp_path / "whole", model=model), task="digits")
    config = settings(tmp_path / "killed", model=model)
    with pytest.raises(Killed):
        attempt(tmp_path / "killed", kill_at=8, config=config, task="digits")
    attempt(tmp_path / "killed", config=config, task="digits")
    assert_same(result_of(tmp_path / "killed"), result_of(tmp_path / "whole"))


def train(rank, world_size, folder):
    Trainer(settings(Path(folder) / str(world_size), max_samples=32), task="digits").run()


def first_step(folder):
    row = next(row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train")
    return row["train/loss"], row["train/grad_norm"]


def test_two_replicas_draw_what_one_draws(tmp_path):
    """With equal micro-batches the first step has the loss and the gradient norm of one replica, to rounding.

    Other micro-batches draw other numbers.
    """
    train(0, 1, tmp_path)
    run_replicas(train, world_size=2, args=(str(tmp_path),))
    Trainer(settings(tmp_path / "other", max_samples=32, micro_batch_size=8), task="digits").run()
    one, two, other = (first_step(tmp_path / name) for name in ("1", "2", "other"))
    assert two == pytest.approx(one, rel=1e-5)
    assert other[1] != pytest.approx(one[1], rel=1e-3)


def test_held_out_figures_draw_nothing(tmp_path):
    """Evaluated twice, in evaluation mode, a model that rounds by chance has one loss."""
    task, pixels, classes = in_few_bits(tmp_path, quantize="int3", rounding="stochastic")
    task.model.eval()
    losses = {task.loss(task.model, (pixels, classes)).item() for _ in range(3)}
    assert len(losses) == 1


class Past(nn.Module):
    """Uses the weight of a layer and not the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, pixels):
        return self.second(functional.linear(pixels, self.first.weight))


def test_a_layer_that_is_not_called_is_refused(tmp_path):
    """Its products would be in full precision and nothing would show it; named as such, the run is accepted."""
    config = settings(tmp_path, model=ModelConfig(quantize="fp8"))
    task = replace(resolve_task("digits"), model=Past())
    with pytest.raises(ConfigError, match=r"does not call the layers first, .*model\.unquantized=first"):
        prepared(task, config)
    named = settings(tmp_path, model=ModelConfig(quantize="fp8", unquantized="first"))
    prepared(replace(resolve_task("digits"), model=Past()), named)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"precision": "bf16"}, "precision=bf16 rounds the products again"),
        ({"execution": ExecutionConfig(compile="blocks")}, "compile=blocks is not emulated"),
        ({"execution": ExecutionConfig(wrapper="fsdp")}, "use ddp"),
        ({"execution": ExecutionConfig(tf32=True)}, "tf32 rounds the products again"),
        ({"model": ModelConfig(rounding="stochastic")}, "model.rounding is given without model.quantize"),
        ({"model": ModelConfig(unquantized="x")}, "model.unquantized is given without model.quantize"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, more, says):
    """Each in one sentence that says what to leave out."""
    with pytest.raises(ConfigError, match=says):
        settings(tmp_path, **more)
