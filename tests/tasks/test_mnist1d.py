"""The task `mnist1d`: signals that are the same everywhere, and as hard as the published ones."""

from __future__ import annotations

import pytest
import torch

from dptrain.errors import ConfigError
from dptrain.tasks.check import check_task
from dptrain.tasks.mnist1d import make_signals, mnist1d


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return mnist1d(model="cnn")


def test_the_data_are_balanced_and_standardised(task):
    """4,000 and 1,000 signals of mean 0 and deviation 1 over both, with ten classes of 500."""
    signals, classes = (torch.cat(parts) for parts in zip(task.train_data.tensors, task.eval_data.tensors, strict=True))
    assert (len(task.train_data), len(task.eval_data), signals.shape[1]) == (4000, 1000, 40)
    assert classes.bincount().tolist() == [500] * 10
    assert signals.mean().item() == pytest.approx(0, abs=1e-5)
    assert signals.std().item() == pytest.approx(1, abs=1e-4)


def test_the_data_depend_on_their_seed_alone():
    """Torch's generator changes nothing, another seed everything."""
    torch.manual_seed(1)
    first = make_signals(30, seed=3)[0]
    torch.manual_seed(2)
    assert torch.equal(make_signals(30, seed=3)[0], first)
    assert not torch.equal(make_signals(30, seed=4)[0], first)


def test_a_convolutional_network_is_as_accurate_as_published(task):
    """After 150,000 samples it has 85 % of the held-out signals right; published are 94 % after 600,000."""
    check_task(task)
    signals, classes = task.train_data.tensors
    held_out, expected = task.eval_data.tensors
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 750)
    for _ in range(750):
        chosen = torch.randint(0, 4000, (200,))
        optimizer.zero_grad()
        task.loss(task.model, (signals[chosen], classes[chosen])).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        assert (task.model(held_out).argmax(1) == expected).float().mean() > 0.85


def test_models_that_it_does_not_have_are_refused():
    """With the names of those that it has."""
    with pytest.raises(ConfigError, match="mnist1d has the models 'mlp', 'cnn', got 'gru'"):
        mnist1d(model="gru")


def test_some_classes_are_a_task_of_their_own():
    """Labels count from 0, the network has as many outputs, and the signals are those of the whole task."""
    whole, part = mnist1d(), mnist1d(classes="5-9", num_train=200)
    signals, classes = whole.train_data.tensors
    chosen = classes >= 5
    assert torch.equal(part.train_data.tensors[0], signals[chosen][:200])
    assert torch.equal(part.train_data.tensors[1], classes[chosen][:200] - 5)
    assert len(part.eval_data) == int((whole.eval_data.tensors[1] >= 5).sum())
    assert part.model.output.out_features == 5


@pytest.mark.parametrize("options", [{"classes": "4"}, {"classes": "5-2"}, {"classes": "0-10"}, {"num_train": 1}])
def test_parts_that_it_does_not_have_are_refused(options):
    """No range of classes, or too few signals."""
    with pytest.raises(ConfigError, match="of mnist1d"):
        mnist1d(**options)
