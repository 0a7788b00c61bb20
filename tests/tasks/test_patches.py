"""The patches task: where its samples come from, what is held out, what its noise is, and that it learns."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_sample_images

from dptrain.errors import ConfigError
from dptrain.tasks import check_task, patches
from dptrain.tasks.patches import _cut


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return patches()


def test_patches_are_tiles_of_the_photographs(task):
    """The first training patch is the top left corner of the first photograph, and no pixel of the grid is lost."""
    corner = torch.tensor(load_sample_images().images[0][:8, :8]) / 255.0 - 0.5
    first = task.train_data.tensors[1][0].view(3, 8, 8)
    torch.testing.assert_close(first, corner.permute(2, 0, 1).float())
    assert (len(task.train_data), len(task.eval_data)) == (2 * 53 * 66, 2 * 53 * 14)


def test_tiles_do_not_overlap():
    """Each pixel is in one tile, and what does not fill one is in none."""
    image = torch.arange(5 * 7, dtype=torch.float32)[..., None].expand(35, 3).reshape(5, 7, 3)
    tiles = _cut(image, size=2)
    assert tiles.shape == (2, 3, 12)
    assert len(tiles.flatten().unique()) == 4 * 6


def test_noise_is_drawn_once_with_the_given_spread(task):
    """Two tasks have the same noisy samples; their noise has the standard deviation that was asked for, and mean 0."""
    noisy, clean = task.train_data.tensors
    assert torch.equal(noisy, patches().train_data.tensors[0])
    assert (noisy - clean).std().item() == pytest.approx(0.1, rel=0.01)
    assert abs((noisy - clean).mean().item()) < 1e-3
    assert -0.5 <= clean.min().item() < clean.max().item() <= 0.5


def test_it_takes_noise_off():
    """A few passes end below the error of who leaves the patches as they are, 0.1² of held-out ones."""
    torch.manual_seed(0)
    task = patches()
    check_task(task)
    noisy, clean = task.eval_data.tensors
    assert (noisy - clean).square().mean().item() == pytest.approx(0.01, rel=0.02)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=task.suggestion.learning_rate)
    for _ in range(4):
        for batch in zip(*(t.split(task.suggestion.global_batch_size) for t in task.train_data.tensors), strict=True):
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()
    assert task.loss(task.model, (noisy, clean)).item() < 0.008


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 0}, "size of patches must be a whole number from 1 to 32, got 0"),
        ({"size": 33}, "got 33"),
        ({"width": 1.5}, "width of patches must be a whole number of at least 1, got 1.5"),
        ({"noise": -1.0}, "noise of patches must be at least 0 and finite, got -1.0"),
        ({"noise": float("nan")}, "noise of patches"),
    ],
)
def test_values_out_of_bounds_are_refused(options, sentence):
    """A value that no patch can have gives one sentence with it."""
    with pytest.raises(ConfigError, match=sentence):
        patches(**options)
