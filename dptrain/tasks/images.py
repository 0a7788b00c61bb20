"""The task `images`: classify your own images by any model of timm or torchvision."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dptrain.data.image_files import Augmentation, LabelledImages, find_images
from dptrain.data.local_datasets import check_columns, load_splits, read_classes
from dptrain.errors import ConfigError
from dptrain.models.vision import vision_model
from dptrain.tasks.base import Suggestion, Task, loss_and_accuracy

# Of the colours of ImageNet's pictures, which pretrained models expect, on a scale of 0 … 255.
_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


def images(
    *,
    data: str,
    model: str = "timm:resnet18",
    size: int | None = None,
    augment: bool = True,
    smallest_crop: float = 0.35,
    flip: bool = True,
    label_smoothing: float = 0.0,
    image_column: str = "image",
    label_column: str = "label",
) -> Task:
    """Classify images from a folder.

    Every image is decoded, cut and resized when it is needed; use `num_workers`, for one process reads some hundred
    images a second. Augmentation depends on the seed and the position alone: it is the same on any number of replicas
    and after a restart, and differs from pass to pass.

    Args:
        data: folder with a folder for each class, or with `train` and `val` of such folders; or a folder that
            `datasets` wrote or reads (arrow, parquet), with a column of images and one of classes.
        model: `timm:NAME` or `torchvision:NAME`, built without weights; `--model.weights` gives it some.
        size: of the images in pixels, on a side; what the model was made for where not given.
        augment: random crops and mirror images in training.
        smallest_crop: least share of the area that a crop keeps, in (0, 1].
        flip: whether half of the training images are mirrored.
        label_smoothing: of the training loss, in [0, 1).
        image_column: name of the column of images.
        label_column: name of the column of classes.

    Returns:
        The task; a sample is (uint8 pixels, class). The loss is cross-entropy in nats; `accuracy` is among
        its figures.

    Raises:
        ConfigError: where the data or the model cannot be had, or an argument is out of bounds.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"size must be a whole number of pixels of at least 1, got {size!r}")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    root = Path(data).expanduser()
    if not root.is_dir():
        raise ConfigError(f"there is no folder {root}, as seen from {Path.cwd()}; nothing is downloaded")
    augmentation = Augmentation(smallest_crop=smallest_crop, flip=flip) if augment else None
    num_classes, train, held_out = _read(root, image_column=image_column, label_column=label_column)
    network, made_for = vision_model(model, num_classes=num_classes)
    pixels = size or made_for
    return Task(
        name=f"images-{model.partition(':')[2]}",
        model=network,
        train_data=LabelledImages(*train, size=pixels, augmentation=augmentation),
        eval_data=LabelledImages(*held_out, size=pixels, augmentation=None),
        loss=partial(image_loss, label_smoothing=label_smoothing),
        eval_loss=image_figures,
        suggestion=Suggestion(
            learning_rate=1e-3,
            global_batch_size=64,
            micro_batch_size=32,
            max_samples=max(1, 30 * len(train[1])),
            eval_every_samples=max(1, len(train[1])),
        ),
    )


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor], *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of uint8 images of shape (samples, 3, height, width); smoothed in training alone."""
    pixels, classes = batch
    smoothing = label_smoothing if model.training else 0.0
    return functional.cross_entropy(model(normalised(pixels)), classes, label_smoothing=smoothing)


def image_figures(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Mean cross-entropy and accuracy of held-out images."""
    pixels, classes = batch
    return loss_and_accuracy(model(normalised(pixels)), classes)


def normalised(pixels: Tensor) -> Tensor:
    """Return float pixels of mean 0 and deviation 1 over ImageNet; on the device, where bytes take a quarter to get."""
    # Channel by channel with numbers of the host: vectors would be copied to the device, which waits for all its work.
    channels = zip(pixels.float().unbind(1), _MEAN, _STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def _read(root: Path, *, image_column: str, label_column: str) -> tuple[int, tuple[Any, Any], tuple[Any, Any]]:
    """Return the number of classes, and images and classes of both parts."""
    is_table = (
        any((root / name).exists() for name in _SAVED) or any(root.glob("*.parquet")) or any(root.glob("*.arrow"))
    )
    if not is_table:
        classes, train, held_out = find_images(root)
        return len(classes), train, held_out
    rows = load_splits(root)
    for part in rows:
        check_columns(part, image_column, label_column, path=root)
    num_classes, labels = read_classes(rows, label_column, path=root)
    return num_classes, *((_Column(part, image_column), of) for part, of in zip(rows, labels, strict=True))  # type: ignore[return-value]


class _Column:
    """One column of a table, decoded row by row.

    Args:
        rows: the table.
        name: of the column.
    """

    def __init__(self, rows: Any, name: str) -> None:  # noqa: ANN401 - a datasets.Dataset
        self._rows = rows.select_columns([name])
        self._name = name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401 - a PIL image
        return self._rows[index][self._name]
