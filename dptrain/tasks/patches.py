"""The task `patches`: take the noise off small patches of two photographs; seconds on one core."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from dptrain.errors import ConfigError
from dptrain.tasks.base import Suggestion, Task

_HELD_OUT_SHARE = 6
_NUM_COLOURS = 3
_LARGEST_VALUE = 255.0
_LARGEST_SIZE = 32
_NOISE_SEED = 0


def patches(*, size: int = 8, noise: float = 0.1, width: int = 128) -> Task:
    """Predict a patch of a photograph from a noisy copy of it, by a network of one hidden layer.

    The photographs are the two that scikit-learn brings, a temple and a flower, cut into patches that do not overlap:
    at the default size 6,996 to train on, and 1,484 of the right-hand sixth of each photograph held out, which no
    training patch overlaps. The noise is Gaussian, drawn once: a patch is the same sample in every pass.

    Args:
        size: of a patch, in pixels on a side; 1 … 32.
        noise: standard deviation, where colours go from −0.5 to 0.5; 0.1 is 25 of 255 levels.
        width: of the hidden layer, at least 1.

    Returns:
        The task; a sample is (noisy patch, patch), both of 3·size² floats. The loss is the mean squared error of a
        value, which is noise² for who leaves the patch as it is.

    Raises:
        ConfigError: where an argument is out of bounds.
    """
    _check(size=size, noise=noise, width=width)
    train, held_out = _load(size)
    generator = torch.Generator().manual_seed(_NOISE_SEED)
    num_values = train.shape[1]
    return Task(
        name="patches",
        model=nn.Sequential(nn.Linear(num_values, width), nn.ReLU(), nn.Linear(width, num_values)),
        train_data=_noisy(train, noise=noise, generator=generator),
        eval_data=_noisy(held_out, noise=noise, generator=generator),
        loss=_squared_error,
        suggestion=Suggestion(
            learning_rate=2e-3,
            global_batch_size=16,
            micro_batch_size=16,
            max_samples=100_000,
            eval_every_samples=10_000,
        ),
    )


def _check(*, size: int, noise: float, width: int) -> None:
    for name, value, largest in (("size", size, _LARGEST_SIZE), ("width", width, None)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or (largest and value > largest):
            bounds = f"from 1 to {largest}" if largest else "of at least 1"
            raise ConfigError(f"{name} of patches must be a whole number {bounds}, got {value!r}")
    if not 0 <= noise < float("inf"):
        raise ConfigError(f"noise of patches must be at least 0 and finite, got {noise!r}")


def _load(size: int) -> tuple[Tensor, Tensor]:
    """Training and held-out patches, each flat, as float32 from −0.5 to 0.5."""
    from sklearn.datasets import load_sample_images

    train, held_out = [], []
    for image in load_sample_images().images:
        grid = _cut(torch.tensor(image, dtype=torch.float32) / _LARGEST_VALUE - 0.5, size=size)
        num_kept = grid.shape[1] - -(-grid.shape[1] // _HELD_OUT_SHARE)
        train.append(grid[:, :num_kept].flatten(0, 1))
        held_out.append(grid[:, num_kept:].flatten(0, 1))
    return torch.cat(train), torch.cat(held_out)


def _cut(image: Tensor, *, size: int) -> Tensor:
    """Patches by row and column, shape (rows, columns, 3·size²); what does not fill one at the edges is left out."""
    tiles = image.unfold(0, size, size).unfold(1, size, size)
    return tiles.reshape(*tiles.shape[:2], _NUM_COLOURS * size * size)


def _noisy(clean: Tensor, *, noise: float, generator: torch.Generator) -> TensorDataset:
    return TensorDataset(clean + noise * torch.randn(clean.shape, generator=generator), clean)


def _squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    noisy, clean = batch
    return functional.mse_loss(model(noisy), clean)
