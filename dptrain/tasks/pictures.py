"""The task `pictures`: MNIST, SVHN or CIFAR10 from a folder that holds them already, read by torchvision."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dptrain.errors import ConfigError
from dptrain.tasks.base import Suggestion, Task

_LARGEST_PIXEL = 255.0
_NUM_CLASSES = 10


def pictures(*, data: str, root: str, width: int = 32) -> Task:
    """Ten classes of small pictures, by a network of two convolutions of stride 2 below a linear layer.

    Nothing is downloaded: `root` is the folder that torchvision's own data sets were stored in. torchvision checks the
    files of SVHN and CIFAR10 against the digests that it knows; those of CIFAR10 are pickles, which is the one place
    where dptrain has any read. The pictures are held in memory as bytes, by every replica: 47 to 220 MB.

    Args:
        data: `"mnist"`, 28×28 grey pixels; `"svhn"` or `"cifar10"`, 32×32 pixels of three colours.
        root: the folder, as torchvision's data sets take it.
        width: channels of the first convolution, at least 1; the second has twice as many.

    Returns:
        The task; a sample is (bytes of shape (colours, height, width), class). Held out is the test set of the data.
        The loss is cross-entropy in nats.

    Raises:
        ConfigError: where `data` or `width` is not one, torchvision cannot be imported, or the data are not there.
    """
    if data not in _READERS:
        raise ConfigError(f"pictures has the data {', '.join(map(repr, _READERS))}, got {data!r}")
    if width < 1:
        raise ConfigError(f"width must be at least 1, got {width}")
    train, held_out = (_read(data, root=root, train=part) for part in (True, False))
    return Task(
        name=f"pictures-{data}",
        model=_network(train.tensors[0].shape[1:], width=width),
        train_data=train,
        eval_data=held_out,
        loss=_cross_entropy,
        suggestion=Suggestion(
            learning_rate=2e-3,
            global_batch_size=64,
            micro_batch_size=64,
            max_samples=5 * len(train),
            eval_every_samples=max(1, len(train) // 4),
        ),
    )


def _read(data: str, *, root: str, train: bool) -> TensorDataset:
    try:
        datasets = importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:  # the latter where it was built for another torch
        raise ConfigError(
            f"task pictures needs torchvision, which cannot be imported here: {error}; install the release that goes "
            f"with torch {torch.__version__}"
        ) from error
    try:
        pixels, classes = _READERS[data](datasets, root, train)
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{data} cannot be read from {root}: {error}; store it there with torchvision first"
        ) from error
    return TensorDataset(pixels, classes)


def _mnist(datasets: Any, root: str, train: bool) -> tuple[Tensor, Tensor]:  # noqa: ANN401, FBT001 - not always installed
    found = datasets.MNIST(root, train=train)
    return found.data[:, None], found.targets.to(torch.int64)


def _svhn(datasets: Any, root: str, train: bool) -> tuple[Tensor, Tensor]:  # noqa: ANN401, FBT001 - as above
    found = datasets.SVHN(root, split="train" if train else "test")
    return torch.as_tensor(found.data), torch.as_tensor(found.labels, dtype=torch.int64)


def _cifar10(datasets: Any, root: str, train: bool) -> tuple[Tensor, Tensor]:  # noqa: ANN401, FBT001 - as above
    found = datasets.CIFAR10(root, train=train)
    pixels = torch.as_tensor(found.data).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.as_tensor(found.targets, dtype=torch.int64)


_READERS: Mapping[str, Callable[[Any, str, bool], tuple[Tensor, Tensor]]] = {
    "mnist": _mnist,
    "svhn": _svhn,
    "cifar10": _cifar10,
}


def _network(shape: torch.Size, *, width: int) -> nn.Module:
    num_colours, height, across = shape
    # A convolution of stride 2 that is padded by 1 halves, and rounds up.
    num_left = 2 * width * -(-height // 4) * -(-across // 4)
    return nn.Sequential(
        nn.Conv2d(num_colours, width, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(num_left, _NUM_CLASSES),
    )


def _cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    pixels, classes = batch
    return functional.cross_entropy(model(pixels / _LARGEST_PIXEL - 0.5), classes)
