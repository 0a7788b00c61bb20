"""What is refused in a task before anything runs, in one sentence each, and that looking leaves no trace."""

from __future__ import annotations

import dataclasses
import gc
import random
import warnings
from unittest import mock

import pytest
import torch
from torch import nn

from dptrain.errors import TaskError
from dptrain.tasks import (
    check,
    check_evaluation,
    check_task,
    fewest_samples,
    losses_of_two_samples,
    resolve_task,
    warn_unless_mean,
)
from dptrain.tasks.base import split_training_loss
from tests.tasks.made_tasks import small_task


class LaterData(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    async def __getitem__(self, index):
        return torch.ones(2)


async def later(*_):
    return 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("attempt", "sentence"),
    [
        (lambda: resolve_task(later), "what task 'later' returns is a coroutine.*write `def`"),
        (lambda: check_task(small_task(loss=later)), "what the loss of task 'small' returns is a coroutine"),
        (lambda: check_task(small_task(collate=later)), "what `collate` of task 'small' returns is a coroutine"),
        (lambda: check_task(small_task(train_data=LaterData())), "sample 0 of the training data .* is a coroutine"),
        (
            lambda: check_evaluation(small_task(eval_data=[torch.ones(2)], eval_loss=later)),
            "what the loss of .* is a coroutine",
        ),
        (lambda: check_evaluation(small_task(eval_data=LaterData())), "sample 0 of eval_data .* is a coroutine"),
        (
            lambda: check_evaluation(small_task(eval_data=[torch.ones(2)], eval_metrics={"x": later})),
            r"what eval_metrics\['x'\] .* is a coroutine",
        ),
    ],
)
def test_async_functions_are_refused_without_a_warning(attempt, sentence):
    """Nobody would run what they return, and Python's warning about it would stand beside the sentence."""
    with mock.patch("sys.unraisablehook") as unraisable:
        with pytest.raises(TaskError, match=sentence):
            attempt()
        gc.collect()
    assert not unraisable.called


OTHER_MODEL = nn.Linear(2, 1)


def _without_elements():
    model = nn.Identity()
    model.empty = nn.Parameter(torch.empty(0))
    return model


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss": lambda model, batch: model(batch).mean().item()}, "must return a scalar tensor, got float"),
        ({"loss": lambda model, batch: model(batch)}, r"got shape \(2, 1\) of torch.float32"),
        ({"loss": lambda model, batch: model(batch).mean() > 0}, "of torch.bool"),
        ({"loss": lambda model, batch: model(batch).mean().detach()}, "returned no graph"),
        ({"loss": lambda _, batch: OTHER_MODEL(batch).mean()}, "reaches no parameter of the model"),
        (
            {"loss": lambda model, batch: model(batch[:, :1])},
            r"does not run .* RuntimeError: .*test_check.py, line \d+",
        ),
        ({"model": nn.Linear(2, 1).requires_grad_(requires_grad=False)}, "no parameter that requires a gradient"),
        ({"model": _without_elements()}, "no parameter that requires a gradient"),
        ({"train_data": [torch.ones(2), torch.ones(3)]}, "do not make a micro-batch: RuntimeError"),
        ({"train_data": torch.utils.data.Dataset()}, "sample 0 .* cannot be read: NotImplementedError"),
    ],
)
def test_loss_that_cannot_train_is_refused(changes, sentence):
    """Each way in which a loss or its samples cannot train a model has a sentence."""
    with pytest.raises(TaskError, match=sentence):
        check_task(small_task(**changes))


def test_loss_that_uses_its_own_model_is_refused():
    """A loss that keeps the task's own model instead of the one it is given would bypass data parallelism."""
    model = nn.Linear(2, 1)
    with pytest.raises(TaskError, match="does it use another one"):
        check_task(small_task(model=model, loss=lambda _, batch: model(batch).mean()))


def test_infinite_loss_passes():
    """Whether the first loss is finite is the trainer's matter."""
    check_task(small_task(loss=lambda model, batch: model(batch).mean() / 0))


WORDS = [(torch.ones(3), torch.tensor([1.0, 0.0, 0.0])), (torch.zeros(3) - 1, torch.tensor([1.0, 1.0, 1.0]))]
"""Two samples of three tokens: what is read, and which of them count."""


def per_token(model, batch):
    tokens, counts = batch
    return (model(tokens.unsqueeze(-1)).squeeze(-1) * counts).sum() / counts.sum()


def per_sample(model, batch):
    tokens, counts = batch
    return ((model(tokens.unsqueeze(-1)).squeeze(-1) * counts).sum(1) / counts.sum(1)).mean()


def noisy_mean(model, batch):
    return per_sample(model, batch) + torch.rand(())


@pytest.mark.parametrize(
    ("loss", "warned"),
    [
        (per_sample, False),
        (per_token, True),
        (lambda model, batch: 2 * len(batch[0]) * per_sample(model, batch), True),
        (noisy_mean, False),
        (lambda model, batch: batch[0].std(0).mean() * per_token(model, batch), False),
    ],
)
def test_a_loss_that_is_no_mean_over_samples_is_warned_of(loss, warned):
    """A mean over tokens and a sum are; a mean over samples, a noisy loss, and one that needs two samples are not."""
    torch.manual_seed(1)
    task = small_task(model=nn.Linear(1, 1), train_data=WORDS, loss=loss)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_unless_mean(task)
    assert ["not a mean over samples" in str(warning.message) for warning in found] == [True] * warned


def test_a_part_that_the_loss_uses_past_the_given_model_is_refused():
    """Replicas would not combine its gradients; one that the given model reaches as well is combined with those."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.first(x)

    kept = Halves()
    past = small_task(model=kept, loss=lambda model, batch: (model(batch) + kept.second(batch)).mean())
    with pytest.raises(TaskError, match=r"uses second\.weight, second\.bias by a model that it kept"):
        check_task(past)
    check_task(small_task(model=kept, loss=lambda model, batch: (model(batch) + kept.first(batch)).mean()))


def test_the_losses_of_two_samples_are_what_replicas_compare():
    """They are the same at each call, or None: for a loss with noise of its own, and for one that is not finite."""
    noise = torch.Generator().manual_seed(1)
    task = small_task(loss=lambda model, batch: model(batch).mean() + torch.rand(()))
    trained, held_out = losses_of_two_samples(task)
    assert losses_of_two_samples(task) == (trained, None)
    assert trained is not None
    assert held_out is None
    noisy = small_task(loss=lambda m, b: m(b).mean() + torch.rand((), generator=noise))
    assert losses_of_two_samples(noisy) == (None, None)
    assert losses_of_two_samples(small_task(loss=lambda m, b: m(b).mean() / 0)) == (None, None)


def test_a_held_out_loss_of_its_own_is_compared_and_none_in_training_mode():
    """A held-out loss has class weights of its own; what a loss counts in training mode are the samples of the run."""
    modes = []

    def losses(weight):
        def loss(model, batch):
            modes.append(model.training)
            return small_task().loss(model, batch)

        held_out = {"eval_data": [torch.ones(2)], "eval_loss": lambda m, b: weight * loss(m, b)}
        return losses_of_two_samples(small_task(loss=loss, **held_out))

    torch.manual_seed(1)
    first = losses(1.0)
    torch.manual_seed(1)
    other = losses(2.0)
    assert first[0] == other[0]
    assert first[1] != other[1]
    assert None not in first + other
    assert not any(modes)


def test_a_large_model_runs_once_more_and_no_oftener(monkeypatch):
    """Each pass of it on the CPU takes long: one way of computing the loss is compared, and none is warned of."""
    monkeypatch.setattr(check, "_MOST_PARAMETERS", 1)
    summed = small_task(loss=lambda model, batch: model(batch).sum())
    trained, held_out = losses_of_two_samples(summed)
    assert (trained is None, held_out) == (False, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unless_mean(summed)


WEIGHT = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (None, "must return a scalar tensor, .* got None"),
        ((WEIGHT, 1), "must return a scalar tensor"),
        ({"cross_entropy": WEIGHT}, "a mapping with one named 'loss'"),
        ({"loss": WEIGHT, "part": 1.0}, "must return a scalar tensor, or a mapping"),
        (WEIGHT.reshape(1), r"one floating-point number for each micro-batch, got the shape \(1,\)"),
        ({"loss": WEIGHT, "part": torch.ones(2)}, r"part must be one floating-point number .* \(2,\)"),
        (WEIGHT * 1j, "of torch.complex64"),
        (WEIGHT.detach(), "no graph"),
    ],
)
def test_what_is_no_loss_in_a_later_step_is_refused_too(loss, sentence):
    """A loss that passed the check may return something else for a later micro-batch: a sentence, and no traceback."""
    with pytest.raises(TaskError, match=sentence):
        split_training_loss(loss)
    assert split_training_loss({"loss": WEIGHT * 2, "part": WEIGHT}) == (WEIGHT * 2, {"part": WEIGHT})


def of_pairs(model, batch):
    if len(batch) < 2:
        raise ValueError("a contrastive loss compares samples")
    return (model(batch)[0] - model(batch)[1]).square().mean()


@pytest.mark.parametrize(
    ("loss", "fewest"),
    [
        (lambda model, batch: model(batch).mean(), 1),
        (of_pairs, 2),
        (lambda model, batch: model(batch).std(), 2),
        (lambda model, batch: model(batch).mean() * float("inf"), 1),
    ],
)
def test_a_loss_that_compares_samples_takes_two_at_least(loss, fewest):
    """One that raises, or is not finite, for a single sample and not for two; the rest of a run is laid out for it."""
    assert fewest_samples(small_task(loss=loss)) == fewest


def test_check_leaves_no_trace():
    """Weights, gradients, running statistics, modes and random states are the same after a check."""
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
    model[2].eval()

    class Noisy(list):
        def __getitem__(self, index):
            return super().__getitem__(index) + random.random() + torch.rand(())

    task = small_task(model=model, train_data=Noisy([torch.ones(2), torch.zeros(2)]))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch_state, random_state = torch.get_rng_state(), random.getstate()
    check_task(task)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == random_state


def test_check_uses_the_tasks_collation():
    """A task's own collate makes the micro-batch that is checked."""
    task = small_task(
        train_data=[{"x": torch.ones(2)}, {"x": torch.zeros(2)}],
        collate=lambda samples: torch.stack([sample["x"] for sample in samples]),
    )
    check_task(task)
    with pytest.raises(TaskError, match="does not run"):
        check_task(dataclasses.replace(task, collate=None))
