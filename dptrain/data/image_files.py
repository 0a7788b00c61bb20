"""Images in folders named by class, or in rows of a table, as uint8 tensors of one size; models are not known here."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dptrain.errors import ConfigError, TaskError

Image = Any
"""A PIL image."""

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"})
_HELD_OUT_NAMES = ("val", "validation", "valid", "test")
_HELD_OUT_EVERY = 10
_CROP_TRIES = 10
_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How a training image varies from pass to pass, after Szegedy et al. 2014 (arXiv 1409.4842).

    Attributes:
        smallest_crop: least share of the area that a random crop keeps, in (0, 1]; 1 crops nothing away.
        flip: whether half of the images are mirrored.
    """

    smallest_crop: float = 0.35
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.smallest_crop <= 1:
            raise ConfigError(f"smallest_crop must be in (0, 1], got {self.smallest_crop}")


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images of one size with their classes; a sample is (uint8, shape (3, size, size); class).

    Random augmentation draws from torch's global generator, which the loader seeds by the sample's position.

    Args:
        images: paths, or rows of a table that hold images.
        labels: class of each.
        size: of the result in pixels, on a side.
        augmentation: of training images; None shows the middle of the image.
    """

    def __init__(
        self, images: Sequence[Any], labels: Sequence[int], *, size: int, augmentation: Augmentation | None
    ) -> None:
        if len(images) != len(labels):
            raise TaskError(f"there are {len(images)} images and {len(labels)} labels")
        self._images = images
        self.labels = tuple(labels)
        self._size = size
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = _decoded(self._images[index])
        box = _middle(image.size) if self._augmentation is None else _random_crop(image.size, self._augmentation)
        image = image.resize((self._size, self._size), resample=2, box=box)  # 2: bilinear
        if self._augmentation is not None and self._augmentation.flip and torch.rand(()) < 0.5:  # noqa: PLR2004 - half
            image = image.transpose(0)  # 0: left to right
        pixels = torch.from_numpy(np.array(image))
        return pixels.permute(2, 0, 1).contiguous(), self.labels[index]


def find_images(root: Path) -> tuple[list[str], tuple[list[Path], list[int]], tuple[list[Path], list[int]]]:
    """Return the names of the classes, and paths and classes of training and of held-out images.

    `root` holds a folder for each class, or `train` and `val` with a folder for each class. Without the latter about a
    tenth of each class is held out, by a hash of the file's path alone, so that more files move none from one side to
    the other. A class in which that would hold out none or all has one image on that side, until there are more.

    Raises:
        ConfigError: where there are fewer than two classes, a class is without training images, or a folder beside
            `train` could be a class or held-out images.
    """
    held_out_root = next((root / name for name in _HELD_OUT_NAMES if (root / name).is_dir()), None)
    has_train = (root / "train").is_dir()
    if has_train and held_out_root is None:
        # Images that lie in `train` itself are those of a class of that name.
        has_train = len(_by_class(root / "train")) > 1
        others = [name for name in _by_class(root) if name != "train"] if has_train else []
        if others:
            raise ConfigError(
                f"{root} holds train, with a folder for each class, beside {', '.join(others)}: name the folder of "
                "held-out images val, or put the images of a class called train into that folder itself"
            )
    train_root = root / "train" if has_train else root
    train = _by_class(train_root)
    classes = sorted(train)
    if len(classes) < 2:  # noqa: PLR2004 - two
        raise ConfigError(f"{root} must hold a folder of images for each of at least two classes, found {classes}")
    if has_train and held_out_root is not None:
        held_out = _by_class(held_out_root)
        if unknown := sorted(set(held_out) - set(classes)):
            raise ConfigError(f"{held_out_root} has classes without training images: {', '.join(unknown)}")
    else:
        held_out = {name: _held_out(paths, root=train_root) for name, paths in train.items()}
        train = {name: sorted(set(paths) - set(held_out[name])) for name, paths in train.items()}
    return classes, _labelled(train, classes), _labelled(held_out, classes)


def _held_out(paths: list[Path], *, root: Path) -> list[Path]:
    """Return the images of a class that are held out; at least one, and not all, where there are two."""
    hashes = {path: zlib.crc32(path.relative_to(root).as_posix().encode()) for path in paths}
    chosen = {path for path in paths if hashes[path] % _HELD_OUT_EVERY == 0}
    by_hash = sorted(paths, key=hashes.__getitem__)
    if len(paths) == 1:
        return []
    if not chosen:
        chosen = {by_hash[0]}
    elif len(chosen) == len(paths):
        chosen.remove(by_hash[-1])
    return [path for path in paths if path in chosen]


def _by_class(root: Path) -> dict[str, list[Path]]:
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
        if paths:
            found[folder.name] = paths
    return found


def _labelled(by_class: dict[str, list[Path]], classes: list[str]) -> tuple[list[Path], list[int]]:
    pairs = [(path, label) for label, name in enumerate(classes) for path in by_class.get(name, [])]
    return [path for path, _ in pairs], [label for _, label in pairs]


def _decoded(image: Any) -> Image:  # noqa: ANN401 - a path or an image
    if not isinstance(image, (str, Path)):
        return image.convert("RGB")
    from PIL import Image as PilImage

    try:
        with PilImage.open(image) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise TaskError(f"image {image} cannot be read: {error}") from error


def _middle(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the largest square in the middle."""
    width, height = size
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_crop(size: tuple[int, int], augmentation: Augmentation) -> tuple[float, float, float, float]:
    """Return a box of random area and aspect that lies in the image; after ten misses, the middle."""
    width, height = size
    for _ in range(_CROP_TRIES):
        area_draw, aspect_draw, left_draw, top_draw = torch.rand(4).tolist()
        smallest = augmentation.smallest_crop
        area = width * height * (smallest + (1 - smallest) * area_draw)
        low, high = map(math.log, _ASPECT)
        aspect = math.exp(low + (high - low) * aspect_draw)
        across, down = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if across <= width and down <= height:
            left, top = left_draw * (width - across), top_draw * (height - down)
            return left, top, left + across, top + down
    return _middle(size)
