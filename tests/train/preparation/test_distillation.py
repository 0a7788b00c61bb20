"""A teacher in the loss: the formula, what it does not touch, what is refused, and runs with one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from dptrain.checkpoint.store import load_newest
from dptrain.errors import ConfigError, TaskError
from dptrain.models.settings import DistillationConfig
from dptrain.tasks import resolve_task
from dptrain.tasks.gpt import gpt
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, TrainConfig, Trainer
from dptrain.train.preparation import prepared
from dptrain.train.preparation.distillation import DistilledLoss, divergence
from dptrain.train.preparation.teacher import digest_of
from tests.runs import Killed, assert_same, attempt, result_of
from tests.tasks.made_data import make_nanogpt_folder


def settings(folder, **more):
    """Settings of a short run of a softmax on the digits."""
    return TrainConfig(
        **{
            "task": "digits",
            "task_options": {"model": "softmax"},
            "run_dir": str(folder),
            "device": "cpu",
            "max_samples": 400,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "control": ControlConfig(law="constant"),
            "checkpoint": CheckpointConfig(every_samples=96),
            "noise": NoiseConfig(every=1),
            "log": LogConfig(tracker="none"),
            **more,
        }
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run that has trained an MLP."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    Trainer(settings(folder, task_options={"model": "mlp"}, max_samples=640)).run()
    return folder


def taught(folder, teacher, **more):
    """Settings of the same run with a teacher."""
    return settings(folder, distillation=DistillationConfig(teacher=str(teacher), **more))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_loss_is_the_plain_formula(temperature, weight):
    """Value and gradient are those of (1 − w)·CE + w·T²·Σ p·(ln p − ln q) in float64, to 1e-5."""
    torch.manual_seed(0)
    student, teacher = nn.Linear(5, 7), nn.Linear(5, 7).eval()
    inputs, classes = torch.randn(6, 5), torch.randint(0, 7, (6,))
    loss = DistilledLoss(
        lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        teacher,
        temperature=temperature,
        weight=weight,
    )(student, (inputs, classes))
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())

    weights = student.weight.detach().double().requires_grad_()
    logits = inputs.double() @ weights.T + student.bias.detach().double()
    p = torch.softmax((inputs.double() @ teacher.weight.double().T + teacher.bias.double()) / temperature, -1)
    q = torch.softmax(logits / temperature, -1)
    own = -torch.log_softmax(logits, -1)[torch.arange(6), classes].mean()
    expected = (1 - weight) * own + weight * temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.weight.grad, weights.grad.float(), rtol=1e-5, atol=1e-6)


def test_the_divergence_is_a_mean_over_samples():
    """Of a whole micro-batch it is the mean of those of its samples, also where a sample has several places."""
    logits, target = torch.randn(2, 4, 3, 5)
    alone = [divergence(logits[i : i + 1], target[i : i + 1], temperature=2.0) for i in range(4)]
    torch.testing.assert_close(divergence(logits, target, temperature=2.0), torch.stack(alone).mean())
    assert float(divergence(logits, logits, temperature=3.0)) == pytest.approx(0.0, abs=1e-6)


def test_the_teacher_is_only_looked_at(tmp_path, teacher):
    """In eval mode without gradients, no part of the model, it draws nothing; held-out figures are the task's."""
    task = resolve_task("digits", options={"model": "softmax"})
    before = torch.random.get_rng_state()
    task, _ = prepared(task, taught(tmp_path, teacher))
    assert torch.equal(torch.random.get_rng_state(), before)
    inner = task.loss._teacher
    assert not any(module.training for module in inner.modules())
    assert not any(p.requires_grad for p in inner.parameters())
    assert len(list(task.model.parameters())) == 2
    assert task.digests == {"the teacher": digest_of(inner)}
    batch = (torch.rand(3, 64), torch.tensor([0, 1, 2]))
    plain = functional.cross_entropy(task.model(batch[0]), batch[1])
    assert torch.equal(task.eval_loss(task.model, batch), plain)
    assert not torch.equal(task.loss(task.model, batch), plain)


def test_what_cannot_be_taught_is_refused(tmp_path, teacher):
    """Outputs that are no logits, a teacher of other classes, no teacher at all: each in one sentence."""
    with pytest.raises(ConfigError, match="they are no logits"):
        prepared(resolve_task("digits", options={"model": "autoencoder"}), taught(tmp_path, teacher))
    task = resolve_task("digits", options={"model": "softmax"})
    task = replace(task, model=nn.Linear(64, 7), train_data=[(torch.rand(64), 1), (torch.rand(64), 2)])
    with pytest.raises(ConfigError, match=r"outputs have shape \(2, 10\) and the model's \(2, 7\)"):
        prepared(task, taught(tmp_path, teacher))
    task = resolve_task("digits")
    with pytest.raises(ConfigError, match="there is no teacher"):
        prepared(task, taught(tmp_path, tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"neither a checkpoint of a run nor a config\.json"):
        prepared(task, taught(tmp_path, tmp_path))
    twice = replace(task, loss=lambda model, batch: task.loss(model, batch) + task.loss(model, batch))
    with pytest.raises(TaskError, match="calls the model 2 times"):
        prepared(twice, taught(tmp_path, teacher))


def test_a_teacher_of_local_blocks_is_refused(tmp_path):
    """It would teach the last block alone, and at a weight of 1 the others would have no loss."""
    task = gpt(data=str(make_nanogpt_folder(tmp_path / "data")), vocab_size=96, context=32, local_blocks=2)
    with pytest.raises(ConfigError, match="would teach the last local block alone"):
        prepared(task, taught(tmp_path / "run", tmp_path / "nowhere"))


def test_experts_are_taught_and_keep_their_balance(tmp_path):
    """At weight 1 the loss is the divergence and the whole balance loss, of which the router has its gradient."""
    options = {"data": str(make_nanogpt_folder(tmp_path / "data")), "vocab_size": 96, "context": 16, "width": 16}
    options |= {"depth": 1, "heads": 2}
    Trainer(settings(tmp_path / "teacher", task="gpt", task_options=options, max_samples=16)).run()
    torch.manual_seed(0)
    task = resolve_task("gpt", options={**options, "num_experts": 4})
    task, _ = prepared(task, taught(tmp_path / "run", tmp_path / "teacher", weight=1.0))
    nn.init.normal_(task.model.blocks[0].experts.router.weight)  # unbalanced
    windows = torch.stack([torch.as_tensor(task.train_data[i]) for i in range(4)]).long()
    logits, routing, _ = task.model.train()(windows[:, :-1])
    target = task.loss._teacher(windows[:, :-1])
    balance = task.model.config.experts.balance_weight * routing.balance
    found = task.loss(task.model, windows)
    torch.testing.assert_close(found["loss"], divergence(logits, target, temperature=2.0) + balance)
    router = task.model.blocks[0].experts.router.weight
    (of_balance,) = torch.autograd.grad(balance, router, retain_graph=True)
    # Experts begin at zero, so that nothing but the balance loss moves the router.
    (gradient,) = torch.autograd.grad(found["loss"], router)
    assert float(of_balance.abs().max()) > 1e-5
    torch.testing.assert_close(gradient, of_balance, rtol=1e-3, atol=1e-8)


@dataclass(frozen=True)
class Frozen:
    """What a model may return."""

    logits: torch.Tensor


class Pair(NamedTuple):
    """What a model may return, too."""

    logits: torch.Tensor
    more: int


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x, 1), lambda x: Pair(x, 1), lambda x: [x], Frozen])
def test_models_may_return_logits_in_any_form(tmp_path, teacher, form):
    """A tensor, a tuple, a NamedTuple, a list, a frozen dataclass: the logits are found and the task is taught."""

    class Formed(nn.Linear):
        def forward(self, features):
            return form(super().forward(features))

    def loss(model, batch):
        found = model(batch[0])
        logits = found if isinstance(found, torch.Tensor) else getattr(found, "logits", None)
        return functional.cross_entropy(found[0] if logits is None else logits, batch[1])

    task = replace(resolve_task("digits", options={"model": "softmax"}), model=Formed(64, 10), loss=loss)
    task, _ = prepared(task, taught(tmp_path, teacher))
    batch = (torch.rand(3, 64), torch.tensor([0, 1, 2]))
    assert not torch.equal(task.loss(task.model, batch), loss(task.model, batch))


def test_a_loss_that_fails_on_moved_outputs_is_one_sentence(tmp_path, teacher):
    """What the task raises where 1 is added to its model's outputs is told as an error of the task."""

    def loss(model, batch):
        logits = model(batch[0])
        if bool(logits.mean() > 0.5):
            raise KeyError("out of bounds")
        return functional.cross_entropy(logits, batch[1])

    task = replace(resolve_task("digits", options={"model": "softmax"}), loss=loss)
    with torch.no_grad():
        task.model.weight.zero_()
        task.model.bias.zero_()
    with pytest.raises(TaskError, match=r"fails on outputs to which 1 is added: .*out of bounds"):
        prepared(task, taught(tmp_path, teacher))


def test_a_model_of_transformers_teaches(tmp_path):
    """A folder that `save_pretrained` wrote is a teacher of our own GPT of the same vocabulary."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 256, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("a text that is long enough for a few windows " * 40)
    options = {"data": str(text), "context": 16, "width": 16, "depth": 1, "heads": 2}
    task, _ = prepared(resolve_task("gpt", options=options), taught(tmp_path, tmp_path / "model", weight=1.0))
    windows = torch.stack([torch.as_tensor(task.train_data[i]) for i in range(2)]).long()
    teacher = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        target = teacher(windows[:, :-1]).logits
        expected = divergence(task.model(windows[:, :-1]), target, temperature=2.0)
        torch.testing.assert_close(task.loss(task.model, windows), expected)


def test_the_ledger_holds_what_the_teacher_costs(tmp_path, teacher):
    """A run with a teacher has the FLOPs of the run without one and of the teacher's forward passes."""
    plain = Trainer(settings(tmp_path / "plain")).run()
    found = Trainer(taught(tmp_path / "taught", teacher)).run()
    forward = 2 * (64 * 32 + 32 * 10)
    assert found["flops"] - plain["flops"] == 400 * forward
    assert found["eval_loss"] != plain["eval_loss"]


def test_a_run_with_a_teacher_is_resumed_bit_for_bit(tmp_path, teacher):
    """Killed and resumed, it ends with the same bytes; the teacher is in no checkpoint, its digest is."""
    attempt(tmp_path / "whole", config=taught(tmp_path / "whole", teacher), task="digits")
    config = taught(tmp_path / "killed", teacher)
    with pytest.raises(Killed):
        attempt(tmp_path / "killed", kill_at=14, config=config, task="digits")
    attempt(tmp_path / "killed", config=config, task="digits")
    whole = result_of(tmp_path / "whole")
    assert_same(result_of(tmp_path / "killed"), whole)
    assert set(load_newest(tmp_path / "whole" / "checkpoints").tensors("model")) == {"weight", "bias"}
    assert len(whole["state"]["data"]["digests"]["the teacher"]) == 64


def test_another_teacher_is_noticed(tmp_path):
    """Where the teacher's folder holds other weights than when the run was saved, it does not go on."""
    teacher, folder = tmp_path / "teacher", tmp_path / "run"
    Trainer(settings(teacher, max_samples=64)).run()
    with pytest.raises(Killed):
        attempt(folder, kill_at=20, config=taught(folder, teacher), task="digits")
    Trainer(settings(teacher, max_samples=96, task_options={"model": "mlp"}, run_dir=str(tmp_path / "other"))).run()
    with pytest.raises(ConfigError, match=r"distillation\.teacher was"):
        attempt(folder, config=taught(folder, tmp_path / "other"), task="digits")
    for part in ("config.yaml", "checkpoints"):
        (teacher / part).rename(teacher / f"old-{part}")
        (tmp_path / "other" / part).rename(teacher / part)
    with pytest.raises(ConfigError, match="cannot resume: the teacher is another one than when"):
        attempt(folder, config=taught(folder, teacher), task="digits")
