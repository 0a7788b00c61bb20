"""Masks of sparse layers: how dense each layer is, a random mask to begin with, and how a mask moves; no loop here.

References: Evci et al. 2020, "Rigging the Lottery" (arXiv 1911.11134), for drop, growth and the Erdős–Rényi kernel;
Mocanu et al. 2018 (arXiv 1707.04780), for sparse training with masks that move.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dptrain.errors import ConfigError
from dptrain.models.settings import SparsityConfig


def sparse_parameters(model: nn.Module, config: SparsityConfig) -> dict[str, nn.Parameter]:
    """Return the weights that get a mask, by name: those of linear and convolutional layers that are trained.

    A weight that an embedding shares stays dense: most of its rows have no gradient in a step.

    Raises:
        ConfigError: where there is none, or a pattern of `dense` matches nothing.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    layers = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd))} - embedded
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) in layers}
    for pattern in [] if config.dense is None else [part.strip() for part in config.dense.split(",") if part.strip()]:
        matching = [name for name in named if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(f"sparsity.dense: no sparse weight is named {pattern!r}; they are {', '.join(named)}")
        named = {name: parameter for name, parameter in named.items() if name not in matching}
    if not named:
        raise ConfigError("sparsity needs linear or convolutional layers that are trained, and the model has none")
    return named


def densities(parameters: Mapping[str, Tensor], config: SparsityConfig) -> dict[str, float]:
    """Return the part of each weight that is not zero; over all of them it is 1 − sparsity.

    With `erk` it is in proportion to (inputs + outputs + kernel sides) / (inputs × outputs × kernel), at most 1: what
    does not fit into a layer goes to the others.
    """
    density = 1 - config.sparsity
    if config.distribution == "uniform":
        return dict.fromkeys(parameters, density)
    raw = {name: sum(p.shape) / math.prod(p.shape) for name, p in parameters.items()}
    full: set[str] = set()
    while True:
        left = density * sum(p.numel() for p in parameters.values()) - sum(parameters[name].numel() for name in full)
        scale = left / sum(raw[name] * parameters[name].numel() for name in raw if name not in full)
        over = {name for name in raw if name not in full and scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else scale * raw[name] for name in raw}
        full |= over


def random_masks(parameters: Mapping[str, Tensor], config: SparsityConfig, *, seed: int) -> dict[str, Tensor]:
    """Return masks, True where a weight is trained: the same for a seed on every replica and device.

    At least one weight of each tensor is trained.
    """
    masks = {}
    for name, density in densities(parameters, config).items():
        parameter = parameters[name]
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        kept = torch.randperm(parameter.numel(), generator=generator)[: max(1, round(density * parameter.numel()))]
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        mask[kept] = True
        masks[name] = mask.view(parameter.shape).to(parameter.device)
    return masks


def moved_mask(mask: Tensor, *, weight: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    """Return a mask with as many weights, of which the smallest were dropped and those of largest gradient grown.

    A weight that was dropped may grow again at once, as in the paper. Ties go to the first in memory, so that equal
    numbers give equal masks.

    Args:
        mask: True where a weight is trained.
        weight: of the same shape.
        gradient: of all weights, also of those that are not trained.
        fraction: of the trained weights to replace, in [0, 1].
    """
    num_trained = int(mask.sum())
    num_moved = min(int(fraction * num_trained), mask.numel() - num_trained)
    kept = _largest(torch.where(mask, weight.abs(), -1.0), num_trained - num_moved)
    # The kept are no candidates, whatever their gradient is.
    return kept | _largest(torch.where(kept, -1.0, gradient.abs().to(weight.dtype)), num_moved)


def drop_fraction(config: SparsityConfig, *, progress: float) -> float:
    """Return the part of the trained weights to replace after a part of the run, from 0 to 1 (paper, section 3.2)."""
    if progress >= config.end_fraction:
        return 0.0
    return config.drop_fraction / 2 * (1 + math.cos(math.pi * progress / config.end_fraction))


def _largest(values: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` largest entries."""
    order = values.flatten().argsort(descending=True, stable=True)
    found = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    found[order[:count]] = True
    return found.view(values.shape)
