"""Other packages that estimate gradient noise, put into a step as their documentation says; none is copied here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

Finish = Callable[[], object]
"""Ends an optimizer step after its backward pass: measures, updates the parameters and clears their gradients."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A package at work in a loop; called where a step ends.

    Attributes:
        finish: ends a step.
        estimate: returns |G|² and tr(Σ)/b as it knows them, b being the samples of a small batch: none gets them.
    """

    finish: Finish
    estimate: Callable[[], tuple[float, float]]

    def __call__(self) -> None:
        """End a step."""
        self.finish()


def k_diffusion(model: DistributedDataParallel, optimizer: Optimizer) -> Peer:
    """`DDPGradientStatsHook` with its `GradientNoiseScale`: a communication hook, and a sum read in each step."""
    gns = _module("k-diffusion", "k_diffusion/gns.py")
    hook, scale = gns.DDPGradientStatsHook(model), gns.GradientNoiseScale()

    def finish() -> None:
        scale.update(*hook.get_stats(), 1, max(2, dist.get_world_size()))
        optimizer.step()
        optimizer.zero_grad()

    return Peer(finish=finish, estimate=scale.get_stats)


def adaptdl(model: DistributedDataParallel, optimizer: Optimizer) -> Peer:
    """`GradientNoiseScale`: hooks on the parameters, its work done when the backward pass ends."""
    scale = _module("adaptdl", "adaptdl/torch/gradient_noise_scale.py").GradientNoiseScale(model, optimizer)

    def finish() -> None:
        scale.gain(2.0)
        optimizer.step()
        scale.reset_accumulation()

    return Peer(finish=finish, estimate=lambda: (scale.sqr_avg(), scale.var_avg()))


def adascale(model: DistributedDataParallel, optimizer: Optimizer) -> Peer:  # noqa: ARG001 - it sees no more than the optimizer
    """Fairscale's `AdaScale`: hooks on the parameters, and an optimizer round the optimizer."""
    from fairscale.optim.adascale import AdaScale  # type: ignore[import-not-found, unused-ignore]

    outer = AdaScale(optimizer)

    def finish() -> None:
        outer.gain()
        outer.step()
        outer.zero_grad()

    # It shows its gain alone, of which these two are the parts.
    return Peer(finish=finish, estimate=lambda: (outer._grad_sqr_avg(), outer._grad_var_avg()))  # noqa: SLF001 - as said


PEERS: dict[str, Callable[[DistributedDataParallel, Optimizer], Peer]] = {
    "k_diffusion": k_diffusion,
    "adaptdl": adaptdl,
    "adascale": adascale,
}


def _module(distribution: str, file: str) -> ModuleType:
    """Import one file of an installed package and not the package round it, which needs a dozen others.

    Raises:
        ImportError: where the package is not installed or lacks the file.
    """
    name = file.removesuffix(".py").replace("/", "_")
    if name in sys.modules:
        return sys.modules[name]
    path = importlib.metadata.distribution(distribution).locate_file(file)
    spec = importlib.util.spec_from_file_location(name, str(path))
    if spec is None or spec.loader is None:
        raise ImportError(f"{distribution} has no {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
