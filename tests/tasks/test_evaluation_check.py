"""An evaluation that would fail is found before training: wrong data, wrong metric, wrong loss."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from dptrain.errors import TaskError
from dptrain.tasks import Suggestion, Task, check_evaluation

DATA = TensorDataset(torch.ones(8, 2))
GOOD = Task(
    name="good",
    model=nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)),
    train_data=DATA,
    eval_data=DATA,
    loss=lambda model, batch: model(batch[0]).square().mean(),
    eval_metrics={"root": lambda loss: loss**0.5},
    suggestion=Suggestion(
        learning_rate=0.1, global_batch_size=4, micro_batch_size=2, max_samples=24, eval_every_samples=8
    ),
)


def wrong_metric(model, batch):
    """Take what metrics of other libraries take."""


def trained_while_evaluated(model, batch):
    """Switch dropout and batch norms on, wherever it is called."""
    return model.train()(batch[0]).square().mean()


def test_a_loss_that_switches_to_training_mode_is_refused():
    """Held-out figures would have dropout in them, and batch norms would learn from held-out data."""
    with pytest.raises(TaskError, match=r"into training mode.*leave out \.train\(\)"):
        check_evaluation(replace(GOOD, loss=trained_while_evaluated))
    check_evaluation(replace(GOOD, loss=trained_while_evaluated, eval_loss=GOOD.loss))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_metrics": {"accuracy": wrong_metric}}, r"eval_metrics\['accuracy'\].*takes the mean held-out loss"),
        ({"eval_metrics": {"name": lambda _: "good"}}, "must return a number, got str"),
        ({"eval_metrics": {"none": lambda _: None}}, "must return a number, got NoneType"),
        ({"eval_data": [1, 2, 3]}, "does not run on the first samples of eval_data"),
        ({"eval_data": {"a": 1}}, r"eval_data\['a'\] of task 'good' cannot be read: TypeError"),
        ({"eval_data": TensorDataset(torch.ones(8, 3))}, "does not run on the first samples of eval_data"),
        ({"eval_data": [object(), object()]}, "do not make a batch"),
        (
            {"loss": lambda model, batch: model(batch[0]).square().mean() if model.training else model(batch[0])},
            r"one number for eval_data, got shape \(2, 1\)",
        ),
    ],
)
def test_what_would_fail_later_is_found_now(changes, words):
    """With the part of the task that is wrong, and what it must be."""
    with pytest.raises(TaskError, match=words):
        check_evaluation(replace(GOOD, **changes))


def test_dropout_that_does_not_depend_on_the_mode_is_warned_of():
    """Held-out figures would differ from one evaluation to the next; a good task is not warned of."""

    def dropped(model, batch):
        return nn.functional.dropout(model(batch[0])).square().mean()

    with pytest.warns(UserWarning, match="draws random numbers for eval_data, .*training=self.training"):
        check_evaluation(replace(GOOD, loss=dropped))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_evaluation(GOOD)


def test_a_good_task_stays_as_it_was():
    """Parameters, running statistics and random numbers are those from before; one held-out sample is enough."""
    before = {name: value.clone() for name, value in GOOD.model.state_dict().items()}
    state = torch.get_rng_state()
    check_evaluation(GOOD)
    check_evaluation(replace(GOOD, eval_data=TensorDataset(torch.ones(1, 2))))
    check_evaluation(replace(GOOD, eval_data=None))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in GOOD.model.state_dict().items())
    assert GOOD.model.training
