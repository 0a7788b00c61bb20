"""The task `digits`: handwritten 8×8 digits of scikit-learn, classified or encoded; also drawn larger, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dptrain.errors import ConfigError
from dptrain.models.vision import vision_model
from dptrain.tasks.base import Suggestion, Task
from dptrain.tasks.images import image_figures, image_loss

_HELD_OUT_EVERY = 6
_LARGEST_PIXEL = 16.0
_NUM_CLASSES = 10


def digits(*, model: str = "mlp", size: int | None = None, num_train: int | None = None) -> Task:
    """Ten classes, 1,497 training and 300 held-out images of 8×8 pixels, scaled to 0 … 1.

    Every sixth image of scikit-learn's order is held out, so the split needs no random numbers. Writers occur on both
    sides: the held-out loss measures the fit to these writers, not to new ones.

    Args:
        model: `"softmax"`, one linear layer; `"mlp"`, layers 64-32-10; `"cnn"`, two convolutions of stride 2 below a
            linear layer; `"autoencoder"`, layers 64-32-8-32-64, which is shown no class; or `timm:NAME` and
            `torchvision:NAME`, built without weights, for which the digits are drawn as pictures.
        size: of a drawn picture in pixels, on a side; what the model was made for where not given.
        num_train: training images, the first of scikit-learn's order; all where not given.

    Returns:
        The task; a sample is (64 float pixels, class), or that of task `images` where digits are drawn. The loss is
        cross-entropy in nats; that of the autoencoder is the mean squared error of a pixel.

    Raises:
        ConfigError: where `model` is none of these or cannot be had, or an argument is out of bounds.
    """
    is_drawn = ":" in model
    if model not in _MODELS and not is_drawn:
        names = ", ".join(map(repr, _MODELS))
        raise ConfigError(f"digits has the models {names}, timm:NAME and torchvision:NAME, got {model!r}")
    if size is not None and (not is_drawn or isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"size of digits is a whole number of pixels for timm:NAME or torchvision:NAME, got {size!r}")
    pixels, classes = _load()
    held_out = torch.arange(len(classes)) % _HELD_OUT_EVERY == 0
    train, rest = ((pixels[part], classes[part]) for part in (~held_out, held_out))
    most = len(train[1])
    if num_train is not None and not 2 <= num_train <= most:  # noqa: PLR2004 - a task has two samples at least
        raise ConfigError(f"num_train of digits must be from 2 to {most}, got {num_train!r}")
    train = (train[0][:num_train], train[1][:num_train])
    return _drawn(train, rest, model=model, size=size) if is_drawn else _plain(train, rest, model=model)


def _plain(train: Sequence[Tensor], held_out: Sequence[Tensor], *, model: str) -> Task:
    return Task(
        name=f"digits-{model}",
        model=_MODELS[model](),
        train_data=TensorDataset(*train),
        eval_data=TensorDataset(*held_out),
        loss=_reconstruction_error if model == "autoencoder" else _cross_entropy,
        suggestion=Suggestion(
            learning_rate=5e-3,
            global_batch_size=16,
            micro_batch_size=16,
            max_samples=30_000,
            eval_every_samples=3_000,
        ),
    )


def _drawn(train: Sequence[Tensor], held_out: Sequence[Tensor], *, model: str, size: int | None) -> Task:
    network, made_for = vision_model(model, num_classes=_NUM_CLASSES)
    draw = partial(drawn, size=size or made_for)
    num_train = len(train[1])
    return Task(
        name=f"digits-{model.partition(':')[2]}",
        model=network,
        train_data=TensorDataset(draw(train[0]), train[1]),
        eval_data=TensorDataset(draw(held_out[0]), held_out[1]),
        loss=image_loss,
        eval_loss=image_figures,
        suggestion=Suggestion(
            learning_rate=1e-3,
            global_batch_size=32,
            micro_batch_size=16,
            max_samples=10 * num_train,
            eval_every_samples=num_train,
        ),
    )


def drawn(pixels: Tensor, *, size: int) -> Tensor:
    """Return 8×8 digits as grey pictures in three colours, enlarged linearly; uint8, shape (samples, 3, size, size).

    Args:
        pixels: from 0 to 1, shape (samples, 64).
        size: on a side.
    """
    large = functional.interpolate(pixels.view(-1, 1, 8, 8), size=(size, size), mode="bilinear")
    # The colours share their memory: 75 MB for all digits at 224 pixels, not 225.
    return (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def _load() -> tuple[Tensor, Tensor]:
    # The file and not `load_digits`: importing sklearn.datasets brings pandas and scipy.stats along, which made up a
    # fifth of the CPU time of starting a replica.
    found = find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    rows = np.loadtxt(Path(found.submodule_search_locations[0]) / "datasets/data/digits.csv.gz", delimiter=",")
    return (
        torch.as_tensor(rows[:, :-1], dtype=torch.float32) / _LARGEST_PIXEL,
        torch.as_tensor(rows[:, -1], dtype=torch.int64),
    )


def _softmax() -> nn.Module:
    return nn.Linear(64, 10)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 8),
        nn.Linear(8, 32),
        nn.ReLU(),
        nn.Linear(32, 64),
    )


_MODELS = {"softmax": _softmax, "mlp": _mlp, "cnn": _cnn, "autoencoder": _autoencoder}


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pixels, classes = batch
    return functional.cross_entropy(model(pixels), classes)


def _reconstruction_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pixels, _ = batch
    return functional.mse_loss(model(pixels), pixels)
