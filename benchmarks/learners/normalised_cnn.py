"""The convolutional network of task mnist1d with a normalisation after each convolution; a task for `learners`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dptrain.errors import ConfigError
from dptrain.tasks import Task
from dptrain.tasks.mnist1d import mnist1d

_CHANNELS = 25


class FilterResponseNorm(nn.Module):
    """x/√(mean of x² over the places + ε), scaled, shifted and cut from below; no mean over samples or channels.

    Singh and Krishnan 2019 (arXiv 1911.09737), equations 1 to 3; the cut replaces the ReLU that follows other norms.

    Args:
        channels: of the input, shape (samples, channels, length).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1))
        self.least = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the normalised inputs, of the same shape."""
        normalised = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + 1e-6)
        return torch.maximum(self.scale * normalised + self.shift, self.least)


def build(*, norm: str = "batch") -> Task:
    """Return mnist1d with its convolutional network normalised.

    Args:
        norm: batch, group (5 groups of 5 channels), response, or none.

    Raises:
        ConfigError: for another norm.
    """
    if norm not in _NORMS:
        raise ConfigError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
    task = mnist1d(model="cnn")
    assert isinstance(task.model, nn.Sequential)
    layers: list[nn.Module] = []
    for layer in task.model:
        if not (isinstance(layer, nn.ReLU) and norm == "response"):
            layers.append(layer)
        if isinstance(layer, nn.Conv1d) and norm != "none":
            layers.append(_NORMS[norm]())
    return replace(task, name=f"mnist1d-cnn-{norm}", model=nn.Sequential(*layers))


_NORMS: Mapping[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(_CHANNELS),
    "group": lambda: nn.GroupNorm(5, _CHANNELS),
    "response": lambda: FilterResponseNorm(_CHANNELS),
    "none": nn.Identity,
}
