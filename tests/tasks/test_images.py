"""The images task in a step: what its loss makes of the pixels, and that the host does not wait for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.gpu.host_syncs import counted
from dptrain.errors import ConfigError
from dptrain.tasks.images import images, normalised


def test_pixels_are_normalised_on_the_device():
    """By the mean and deviation of each channel over ImageNet, without a copy from the host."""
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with counted() as waits:
        found = normalised(pixels)
    assert not waits, waits
    mean, std = (torch.tensor(values)[:, None, None] for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    assert torch.equal(found, (pixels.float() - mean) / std)


def make_table(folder, **splits):
    datasets = pytest.importorskip("datasets")
    image = datasets.Image()
    features = datasets.Features({"image": image, "label": datasets.Value("int64")})
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"image": [pixels] * len(labels), "label": labels}, features=features)
            for name, labels in splits.items()
        }
    ).save_to_disk(str(folder))
    return str(folder)


@pytest.mark.parametrize(
    ("splits", "complaint"),
    [
        ({"train": [0, 1, 9], "test": [-1, -1]}, r"held-out rows without a class \(label=-1\): leave them out"),
        ({"train": [0, None, 1], "test": [1]}, "training rows without a class .label=None"),
        ({"train": [0, 1], "test": [2]}, "has a class 2, and its training rows have 2 classes"),
    ],
)
def test_rows_without_a_class_are_named_as_such(tmp_path, splits, complaint):
    """A test split that nobody has labelled is a split to leave out; the class that is too large is another mistake."""
    with pytest.raises(ConfigError, match=complaint):
        images(data=make_table(tmp_path / "data", **splits))
