"""The images task in a step: what its loss makes of the pixels, and that the host does not wait for it."""

from __future__ import annotations

import torch

from benchmarks.gpu.host_syncs import counted
from dptrain.tasks.images import normalised


def test_pixels_are_normalised_on_the_device():
    """By the mean and deviation of each channel over ImageNet, without a copy from the host."""
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with counted() as waits:
        found = normalised(pixels)
    assert not waits, waits
    mean, std = (torch.tensor(values)[:, None, None] for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    assert torch.equal(found, (pixels.float() - mean) / std)
