"""Hidden states of a teacher in the loss: the formula, the projection, what is refused, and a run with them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from dptrain.checkpoint.store import load_newest
from dptrain.config.settings_file import build_config
from dptrain.errors import ConfigError
from dptrain.models.settings import DistillationConfig
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, TrainConfig, Trainer
from dptrain.train.preparation.distillation import DistilledLoss
from dptrain.train.preparation.hidden_states import hidden_states, projection
from tests.runs import Killed, assert_same, attempt, result_of


def network(width):
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 7))


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def distilled(student, teacher, text, *, weight=0.7, loss=cross_entropy):
    hidden = hidden_states(text, weight=weight, model=student, teacher=teacher)
    return DistilledLoss(loss, teacher, temperature=2.0, weight=0.5, hidden=hidden)


@pytest.mark.parametrize("width", [4, 6, 9])
def test_the_loss_is_the_plain_formula(width):
    """Value and gradient are those of the loss of logits and 0.7 × the mean squared difference, by hand in float64."""
    torch.manual_seed(0)
    student, teacher = network(6), network(width).eval()
    inputs, classes = torch.randn(3, 5), torch.randint(0, 7, (3,))
    loss = distilled(student, teacher, "0, 1=1")(student, (inputs, classes))
    loss.backward()

    by_hand, to = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    by_hand.zero_grad()
    own, target = [inputs.double()], [inputs.double()]
    for layer, other in zip(by_hand, to, strict=True):
        own.append(layer(own[-1]))
        target.append(other(target[-1]).detach())
    matrix = torch.eye(6).double() if width == 6 else projection(width, 6).double()
    distances = [((own[place] - target[place] @ matrix) ** 2).sum() / (3 * 6) for place in (1, 2)]
    p, q = (torch.softmax(logits / 2, -1) for logits in (target[-1], own[-1]))
    expected = 0.5 * functional.cross_entropy(own[-1], classes) + 0.5 * 4 * (p * (p.log() - q.log())).sum(-1).mean()
    expected = expected + 0.7 * sum(distances) / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for found, parameter in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found.grad, parameter.grad.float(), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_distance_is_a_mean_over_samples():
    """The loss of a micro-batch is the mean of those of its samples, so that the noise scale keeps its meaning."""
    torch.manual_seed(0)
    student, teacher = network(6), network(9).eval()
    inputs, classes = torch.randn(4, 5), torch.randint(0, 7, (4,))
    loss = distilled(student, teacher, "1")
    alone = [loss(student, (inputs[i : i + 1], classes[i : i + 1])) for i in range(4)]
    torch.testing.assert_close(loss(student, (inputs, classes)), torch.stack(alone).mean())


@pytest.mark.parametrize(("width", "to"), [(8, 3), (3, 8), (5, 5)])
def test_the_projection_keeps_lengths_and_is_always_the_same(width, to):
    """Orthonormal along the smaller side; it draws from no generator of anybody else."""
    before = torch.random.get_rng_state()
    matrix = projection(width, to)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert matrix.shape == (width, to)
    small = matrix.T @ matrix if width >= to else matrix @ matrix.T
    torch.testing.assert_close(small, torch.eye(min(width, to)), rtol=0, atol=1e-6)
    assert torch.equal(matrix, projection(width, to))


def test_wrapped_models_are_looked_into_and_left_as_they_were():
    """A model in a wrapper has the same loss; after it no hook is left, and a second call is not counted twice."""
    torch.manual_seed(0)
    student, teacher = network(6), network(6).eval()
    batch = (torch.randn(3, 5), torch.tensor([0, 1, 2]))
    loss = distilled(student, teacher, "0,1")
    assert torch.equal(loss(torch.nn.DataParallel(student), batch), loss(student, batch))
    assert not any(module._forward_hooks for network in (student, teacher) for module in network.modules())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (",", "names no modules"),
        ("block.0", "the model has no module 'block.0'"),
        ("0=3", "the teacher has no module '3'"),
    ],
)
def test_names_that_there_are_not_are_refused(text, sentence):
    """No name, one that the model has not, one that the teacher has not."""
    with pytest.raises(ConfigError, match=sentence):
        distilled(network(6), network(6), text)


def test_states_that_cannot_be_compared_are_refused():
    """Other places than the teacher's, a module that runs twice, and settings that would be ignored or see nothing."""
    batch = (torch.randn(3, 5), torch.tensor([0, 1, 2]))
    folded = nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 7))
    with pytest.raises(ConfigError, match=r"1 of the model returns shape \(3, 6\) and 1 of the teacher \(3, 2, 3\)"):
        distilled(network(6), folded, "1")(network(6), batch)
    layer = nn.Linear(5, 5)
    twice = nn.Sequential(layer, layer, nn.Linear(5, 7))
    with pytest.raises(ConfigError, match="0 of the model is called 2 times"):
        distilled(twice, network(5), "0")(twice, batch)
    with pytest.raises(ConfigError, match=r"without distillation\.teacher"):
        build_config({"distillation": {"hidden": "0"}})
    with pytest.raises(ConfigError, match=r"execution\.compile=model melts them together"):
        build_config({"distillation": {"hidden": "0", "teacher": "x"}, "execution": {"compile": "model"}})


def test_a_run_with_hidden_states_is_resumed_bit_for_bit(tmp_path):
    """Killed and resumed it ends with the same bytes, and its checkpoints hold the model's own tensors alone."""

    def settings(name, **more):
        return TrainConfig(
            task="digits",
            run_dir=str(tmp_path / name),
            device="cpu",
            global_batch_size=16,
            micro_batch_size=4,
            control=ControlConfig(law="constant"),
            checkpoint=CheckpointConfig(every_samples=48),
            noise=NoiseConfig(every=1),
            log=LogConfig(tracker="none"),
            **{"max_samples": 160, **more},
        )

    Trainer(settings("mlp", max_samples=32)).run()
    teaching = DistillationConfig(teacher=str(tmp_path / "mlp"), hidden="0")
    attempt(tmp_path / "whole", config=settings("whole", distillation=teaching), task="digits")
    config = settings("killed", distillation=teaching)
    with pytest.raises(Killed):
        attempt(tmp_path / "killed", kill_at=7, config=config, task="digits")
    attempt(tmp_path / "killed", config=config, task="digits")
    assert_same(result_of(tmp_path / "killed"), result_of(tmp_path / "whole"))
    names = set(load_newest(tmp_path / "whole" / "checkpoints").tensors("model"))
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}
