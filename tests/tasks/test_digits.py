"""The digits task: its split, its models, its pictures, and that it learns."""

from __future__ import annotations

import sys

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


def test_images_are_those_of_scikit_learn():
    """The file that is read gives what `load_digits` gives, to the bit and in its order."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    held_out = torch.arange(len(classes)) % 6 == 0
    task = digits()
    for part, data in ((~held_out, task.train_data), (held_out, task.eval_data)):
        assert torch.equal(data.tensors[0], torch.as_tensor(pixels, dtype=torch.float32)[part] / 16)
        assert torch.equal(data.tensors[1], torch.as_tensor(classes)[part])


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


def test_few_training_images_are_the_first_and_the_held_out_ones_stay():
    """With `num_train` 20 the samples are the first 20 of all, and all 300 are held out."""
    few, all_of_them = digits(num_train=20), digits()
    assert torch.equal(few.train_data.tensors[0], all_of_them.train_data.tensors[0][:20])
    assert len(few.eval_data) == 300


def test_a_drawn_digit_is_the_small_one_enlarged(monkeypatch):
    """Grey in three colours, bytes, of the asked size; means over blocks have the order of the 8×8 pixels."""
    monkeypatch.setattr(
        sys.modules["dptrain.tasks.digits"],
        "vision_model",
        lambda _, *, num_classes: (torch.nn.Linear(1, num_classes), 224),
    )
    task, small = digits(model="timm:some", size=40, num_train=30), digits(num_train=30)
    pictures, classes = task.train_data.tensors
    assert (pictures.dtype, tuple(pictures.shape)) == (torch.uint8, (30, 3, 40, 40))
    assert torch.equal(pictures[:, 0], pictures[:, 2])
    assert torch.equal(classes, small.train_data.tensors[1])
    blocks = torch.nn.functional.avg_pool2d(pictures[:, :1].float(), 5).flatten() / 255
    correlation = torch.corrcoef(torch.stack([blocks, small.train_data.tensors[0].flatten()]))[0, 1]
    assert correlation > 0.95
    assert digits(model="timm:some", num_train=2).train_data.tensors[0].shape[-1] == 224


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "resnet"}, "'cnn', 'autoencoder', timm:NAME and torchvision:NAME, got 'resnet'"),
        ({"size": 32}, "size of digits is a whole number of pixels for timm:NAME or torchvision:NAME, got 32"),
        ({"model": "timm:some", "size": 0}, "got 0"),
        ({"num_train": 1}, "num_train of digits must be from 2 to 1497, got 1"),
        ({"num_train": 1498}, "from 2 to 1497, got 1498"),
    ],
)
def test_what_there_is_not_is_refused(options, sentence):
    """An unknown model, a size for what is not drawn, and more or fewer images than there are: one sentence each."""
    with pytest.raises(ConfigError, match=sentence):
        digits(**options)
