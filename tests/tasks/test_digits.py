"""The digits task: its split, its models, and that they learn."""

from __future__ import annotations

import pytest
import torch

from dptrain.errors import ConfigError
from dptrain.tasks import check_task, digits


def test_split_is_fixed_and_disjoint():
    """Every image is on exactly one side, the same on every call."""
    first, second = digits(), digits(model="cnn")
    assert (len(first.train_data), len(first.eval_data)) == (1497, 300)
    assert torch.equal(first.eval_data.tensors[0], second.eval_data.tensors[0])
    train, held_out = ({tuple(row.tolist()) for row in side.tensors[0]} for side in (first.train_data, first.eval_data))
    assert len(train) + len(held_out) == 1797  # no two images of the set are equal
    assert not train & held_out


def test_pixels_are_scaled():
    """Pixels fill the range 0 … 1 and classes are 0 … 9."""
    pixels, classes = digits().train_data.tensors
    assert (pixels.min().item(), pixels.max().item()) == (0.0, 1.0)
    assert classes.unique().tolist() == list(range(10))


def test_mlp_is_the_one_of_the_literature():
    """The MLP is 64-32-10: 2,410 parameters."""
    assert sum(parameter.numel() for parameter in digits().model.parameters()) == 64 * 32 + 32 + 32 * 10 + 10


def _after_five_passes(task):
    check_task(task)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=task.suggestion.learning_rate)
    for _ in range(5):
        for batch in zip(*(t.split(task.suggestion.global_batch_size) for t in task.train_data.tensors), strict=True):
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()
    return task.loss(task.model, task.eval_data.tensors).item()


@pytest.mark.parametrize(("model", "reached"), [("softmax", 0.5), ("mlp", 0.3), ("cnn", 0.3)])
def test_classifiers_learn(model, reached):
    """A few passes at the suggested settings bring the held-out loss well below a guess's ln 10 = 2.3."""
    torch.manual_seed(0)
    assert _after_five_passes(digits(model=model)) < reached


def test_autoencoder_learns():
    """A few passes leave less than half of the pixels' variance unexplained, though all goes through eight numbers."""
    torch.manual_seed(0)
    task = digits(model="autoencoder")
    pixels, _ = task.eval_data.tensors
    assert _after_five_passes(task) < pixels.var(dim=0, correction=0).mean().item() / 2


def test_autoencoder_is_shown_no_class():
    """Its loss is the same whatever the classes are."""
    task = digits(model="autoencoder")
    pixels, classes = task.eval_data.tensors
    assert task.loss(task.model, (pixels, classes)).item() == task.loss(task.model, (pixels, 9 - classes)).item()


def test_unknown_model_is_refused():
    """A model that is not there gives a sentence with those that are."""
    with pytest.raises(ConfigError, match="'cnn', 'autoencoder', got 'resnet'"):
        digits(model="resnet")
