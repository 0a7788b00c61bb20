"""The task `digits`: handwritten 8×8 digits of scikit-learn, classified or encoded; seconds on one core."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dptrain.errors import ConfigError
from dptrain.tasks.base import Suggestion, Task

_HELD_OUT_EVERY = 6
_LARGEST_PIXEL = 16.0


def digits(*, model: str = "mlp") -> Task:
    """Ten classes, 1,497 training and 300 held-out images of 8×8 pixels, scaled to 0 … 1.

    Every sixth image of scikit-learn's order is held out, so the split needs no random numbers. Writers occur on both
    sides: the held-out loss measures the fit to these writers, not to new ones.

    Args:
        model: `"softmax"`, one linear layer; `"mlp"`, layers 64-32-10; `"cnn"`, two convolutions of stride 2 below a
            linear layer; or `"autoencoder"`, layers 64-32-8-32-64, which is shown no class.

    Returns:
        The task; a sample is (64 float pixels, class). The loss is cross-entropy in nats; that of the autoencoder is
        the mean squared error of a pixel.

    Raises:
        ConfigError: where `model` is none of these.
    """
    if model not in _MODELS:
        raise ConfigError(f"digits has the models {', '.join(map(repr, _MODELS))}, got {model!r}")
    pixels, classes = _load()
    held_out = torch.arange(len(classes)) % _HELD_OUT_EVERY == 0
    return Task(
        name=f"digits-{model}",
        model=_MODELS[model](),
        train_data=TensorDataset(pixels[~held_out], classes[~held_out]),
        eval_data=TensorDataset(pixels[held_out], classes[held_out]),
        loss=_reconstruction_error if model == "autoencoder" else _cross_entropy,
        suggestion=Suggestion(
            learning_rate=5e-3,
            global_batch_size=16,
            micro_batch_size=16,
            max_samples=30_000,
            eval_every_samples=3_000,
        ),
    )


def _load() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    return (
        torch.as_tensor(pixels, dtype=torch.float32) / _LARGEST_PIXEL,
        torch.as_tensor(classes, dtype=torch.int64),
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
