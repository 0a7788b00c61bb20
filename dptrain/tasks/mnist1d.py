"""The task `mnist1d`: ten classes of 40-point signals, made on the spot; a vision problem that trains in seconds.

The recipe and its constants are those of Greydanus, "Scaling down deep learning" (arXiv 2011.14439, code Apache-2.0).
The random numbers are our own, so single signals differ from the published file; the distribution is the same.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dptrain.errors import ConfigError
from dptrain.tasks.base import Suggestion, Task, loss_and_accuracy

Signals = NDArray[np.float64]

_DATA_SEED = 42
_NUM_TRAIN, _NUM_HELD_OUT = 4000, 1000
_LENGTH = 40
_NUM_CLASSES = 10
_PADDING = (36, 60)
_SCALE = 0.4
_MAX_TRANSLATION = 48
_SMOOTH_NOISE, _SMOOTHING = 0.25, 2.0
_NOISE = 0.02
_SHEAR = 0.75
# Twelve heights of each digit's outline, as one would trace it with a pen.
_OUTLINES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)


def mnist1d(*, model: str = "mlp", classes: str | None = None, num_train: int | None = None) -> Task:
    """Ten classes, 4,000 training and 1,000 held-out signals of 40 points; or some of the classes, or fewer signals.

    Args:
        model: `"mlp"`, layers 40-100-100-10 with one residual connection; or `"cnn"`, three convolutions of stride 2
            below a linear layer. Published accuracies of such models are 68 % and 94 %.
        classes: the first and the last class, such as "0-4", for a network that knows these alone and is tuned to the
            others; they are counted from 0 in the task. All ten where not given.
        num_train: training signals, the first of those of the classes; all where not given.

    Returns:
        The task; a sample is (40 floats, class). The loss is cross-entropy in nats; `accuracy` is among its figures.

    Raises:
        ConfigError: where `model` is none of these, or an argument is out of bounds.
    """
    if model not in _MODELS:
        raise ConfigError(f"mnist1d has the models {', '.join(map(repr, _MODELS))}, got {model!r}")
    first, last = _bounds(classes)
    signals, labels = _all_signals()
    chosen, in_train = (labels >= first) & (labels <= last), torch.arange(len(labels)) < _NUM_TRAIN
    train, held_out = ((signals[part], labels[part] - first) for part in (chosen & in_train, chosen & ~in_train))
    most = len(train[1])
    if num_train is not None and not 2 <= num_train <= most:  # noqa: PLR2004 - a task has two samples at least
        raise ConfigError(f"num_train of mnist1d must be from 2 to {most} for these classes, got {num_train!r}")
    return Task(
        name=f"mnist1d-{model}",
        model=_MODELS[model](last - first + 1),
        train_data=TensorDataset(*(part[:num_train] for part in train)),
        eval_data=TensorDataset(*held_out),
        loss=_cross_entropy,
        eval_loss=_figures,
        suggestion=Suggestion(
            learning_rate=5e-3,
            global_batch_size=64,
            micro_batch_size=32,
            max_samples=200_000,
            eval_every_samples=20_000,
        ),
    )


def _bounds(classes: str | None) -> tuple[int, int]:
    if classes is None:
        return 0, _NUM_CLASSES - 1
    first, dash, last = str(classes).partition("-")
    digits = [str(number) for number in range(_NUM_CLASSES)]
    if not dash or first not in digits or last not in digits or int(first) >= int(last):
        raise ConfigError(f'classes of mnist1d are the first and the last of 0 to 9, such as "0-4", got {classes!r}')
    return int(first), int(last)


@functools.cache
def _all_signals() -> tuple[Tensor, Tensor]:
    """Return the data of the task, which nobody changes; they take a second to make."""
    return make_signals(_NUM_TRAIN + _NUM_HELD_OUT, seed=_DATA_SEED)


def make_signals(num_samples: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return float32 signals of shape (samples, 40) and their classes, int64, in an order without pattern.

    Args:
        num_samples: how many, equally many of each class up to one.
        seed: of all that is drawn; the data of the task have a seed of their own, whatever the run's is.
    """
    random = np.random.default_rng(seed)
    classes = random.permutation(np.arange(num_samples) % _NUM_CLASSES)
    outlines = _normalised_outlines()
    signals = np.stack([_signal(outlines[label], random) for label in classes])
    signals = (signals - signals.mean()) / signals.std()
    return torch.as_tensor(signals, dtype=torch.float32), torch.as_tensor(classes, dtype=torch.int64)


def _normalised_outlines() -> Signals:
    outlines = np.array(_OUTLINES)
    outlines = (outlines - outlines.mean(1, keepdims=True)) / outlines.std(1, keepdims=True)
    scaled: Signals = (outlines - outlines[:, :1]) / 6
    return scaled


def _signal(outline: Signals, random: np.random.Generator) -> Signals:
    """Pad, stretch, scale and shift an outline, fill the rest with smooth noise, add noise, shear, and sample it."""
    from scipy.ndimage import gaussian_filter1d

    low, high = _PADDING
    padded = np.concatenate([outline, np.zeros(random.integers(low, high + 1))])
    # Tells the outline, which begins at 0, from the padding.
    inside = np.concatenate([np.ones(len(outline)), np.zeros(len(padded) - len(outline))])
    length = len(outline) + high
    signal = _resampled(padded, length) * (1 + _SCALE * (random.random() - 0.5))
    shift = int(random.integers(_MAX_TRANSLATION))
    signal, mask = np.roll(signal, shift), np.roll(_resampled(inside, length), shift) > 0
    smooth_noise = gaussian_filter1d(_SMOOTH_NOISE * random.standard_normal(length), _SMOOTHING)
    signal = np.where(mask, signal, smooth_noise) + _NOISE * random.standard_normal(length)
    signal -= _SHEAR * (random.random() - 0.5) * np.linspace(-0.5, 0.5, length)
    return _resampled(signal, _LENGTH)


def _resampled(signal: Signals, length: int) -> Signals:
    """Return the signal at so many evenly spaced places, by linear interpolation."""
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(signal)), signal)


class _Mlp(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(_LENGTH, 100)
        self.second = nn.Linear(100, 100)
        self.output = nn.Linear(100, num_classes)

    def forward(self, signals: Tensor) -> Tensor:
        hidden = functional.relu(self.first(signals))
        hidden = hidden + functional.relu(self.second(hidden))
        logits: Tensor = self.output(hidden)
        return logits


def _cnn(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, _LENGTH)),
        nn.Conv1d(1, 25, kernel_size=5, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(25 * 5, num_classes),
    )


_MODELS = {"mlp": _Mlp, "cnn": _cnn}


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    signals, classes = batch
    return functional.cross_entropy(model(signals), classes)


def _figures(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    signals, classes = batch
    return loss_and_accuracy(model(signals), classes)
