"""Whether all replicas are about to do the same: settings, versions, data and model, compared before the first step."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dptrain.config.settings_file import settings_text
from dptrain.config.train_config import LogConfig, TrainConfig
from dptrain.errors import ConfigError
from dptrain.version import __version__

_LOSS_TOLERANCE = 0.01
"""Relative: kernels of different processors differ by 1e-6 in single precision and 1e-2 at most in half."""
_LOSS_FLOOR = 1e-4
"""Below it a loss may be what rounding leaves of larger terms."""


INITIAL_VALUES = "the model's initial values"


def check_agreement(subjects: Mapping[str, object], *, device: torch.device) -> None:
    """Refuse to start where replicas differ in one of `subjects`. A collective; waits.

    Args:
        subjects: what must be the same on all replicas, by its name in the error; compared by the digest of its repr.
        device: where the collective runs.

    Raises:
        ConfigError: naming what differs, on all replicas alike.
    """
    if not dist.is_initialized():
        return
    own = torch.tensor([_number(repr(subject)) for subject in subjects.values()], device=device)
    extremes = torch.cat([own, -own])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes.chunk(2)
    differing = [name for name, same in zip(subjects, (largest == -smallest).tolist(), strict=True) if not same]
    if differing:
        raise ConfigError(
            f"the replicas do not agree on {', '.join(differing)}: start them all with the same settings, code and "
            "data, and seed or sort what each process builds for itself (random splits, vocabularies from a set)"
        )


def check_same_run(config: TrainConfig, subjects: Mapping[str, object], *, device: torch.device) -> None:
    """Refuse to start where replicas differ in settings, versions or one of `subjects`; see `check_agreement`."""
    own = {
        "the settings": settings_text(replace(config, run_dir=None, log=LogConfig())),
        "the version of dptrain": __version__,
        "the version of torch": torch.__version__,
    }
    check_agreement({**own, **subjects}, device=device)


def check_same_loss(loss: float | None, *, device: torch.device) -> None:
    """Refuse to start where the replicas' losses of the same samples and parameters differ. A collective; waits.

    Args:
        loss: one of `losses_of_two_samples`; None for one that cannot be compared.
        device: where the collective runs.

    Raises:
        ConfigError: with the two losses farthest apart, on all replicas alike.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    known, value = float(loss is not None), loss or 0.0
    extremes = torch.tensor([value, -value, -known], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest, all_known = extremes.tolist()
    smallest = -smallest
    if all_known == -1 and not is_same_loss(smallest, largest):
        raise ConfigError(
            f"the replicas do not agree on the loss of the same two samples ({smallest:.4g} on one, {largest:.4g} on "
            "another): the loss must not depend on the rank, nor on what each process builds for itself, such as class "
            "weights: seed that, or compute it from the whole data set"
        )


def is_same_loss(first: float, second: float) -> bool:
    """Whether two losses of the same samples by the same parameters differ by no more than processors round."""
    return abs(first - second) <= _LOSS_TOLERANCE * max(abs(first), abs(second), _LOSS_FLOOR)


def model_digests(model: nn.Module) -> dict[str, object]:
    """Return digests of the entries of a model's state dict, before they are wrapped, for `check_agreement`.

    DDP pairs parameters and buffers of replicas by their place alone, and overwrites those of the others with those of
    rank 0: with buffers in another order it mixes them up in silence.
    """
    entries = [
        (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)
    ]
    buffers = list(dict(model.named_buffers()))
    forms = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in entries if not is_lazy(tensor)]
    values = [(name, _checksum(tensor)) for name, tensor in entries if not is_lazy(tensor)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    # Those of torch's own modules alone: others may write anything into theirs.
    modules = [
        (name, module) for name, module in model.named_modules() if type(module).__module__.startswith("torch.nn.")
    ]
    own = [(name, type(module).__name__, module.extra_repr()) for name, module in modules]
    return {
        "the settings of the model's modules, such as a dropout rate": own,
        "which of the model's parameters require a gradient": sorted(trained),
        "the names, order and shapes of the model's parameters and buffers": (forms, buffers),
        INITIAL_VALUES: sorted(values),
    }


def _checksum(tensor: Tensor) -> int:
    """Return a checksum of a tensor's bytes; at 3.7 GB/s on one core, three times as fast as a sha256."""
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    if not dense.numel():
        return 0
    return zlib.crc32(dense.cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _number(text: str) -> int:
    """Return 63 bits of a digest: a whole number that has a negative."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_device(config: TrainConfig) -> None:
    """Refuse GPUs that are not there, in place of what accelerate and CUDA would say."""
    if config.device == "cpu":
        return
    num_gpus, num_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if config.device == "cuda" and num_gpus == 0:
        raise ConfigError("device is cuda, but torch finds no GPU: use device=auto or device=cpu")
    if 0 < num_gpus < num_here and not config.execution.share_devices:
        raise ConfigError(
            f"there are {num_here} replicas on this node, but {num_gpus} GPUs: start {num_gpus} replicas, use "
            f"device=cpu, or have them share GPUs with execution.share_devices=true"
        )
