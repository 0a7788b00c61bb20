"""Whether all replicas are about to do the same: settings, versions and data, compared once before the first step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from dptrain.config.train_config import TrainConfig
from dptrain.data import SampleStream, Slot, SlotSource
from dptrain.errors import ConfigError

_NUM_PROBES = 8


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
            f"the replicas do not agree on {', '.join(differing)}: start them all with the same settings, code and data"
        )


def data_fingerprint(dataset: Dataset[Any], *, seed: int) -> str:
    """Return a digest of a few samples spread over the data set, and of its length.

    What is not a tensor, an array, a number or text counts by its type alone. Samples are read from fixed seeds, so
    that random augmentation changes nothing.
    """
    num_samples = len(dataset)  # type: ignore[arg-type]
    # A stream names its own: a late sample would have to be read up to.
    probes = getattr(dataset, "probes", None) or sorted(
        {round(i * (num_samples - 1) / (_NUM_PROBES - 1)) for i in range(_NUM_PROBES)}
    )
    source = SlotSource(dataset, stream=SampleStream(num_samples, seed=seed, shuffle=False), collate=_first)
    digest = hashlib.sha256(str(num_samples).encode())
    for index in probes:
        _, sample = source[Slot(micro_step=0, rank=0, position=index, num_samples=1)]
        _feed(digest, sample)
    return digest.hexdigest()[:16]


def _first(samples: list[Any]) -> object:
    return samples[0]


def _feed(digest: hashlib._Hash, value: object) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype}{value.shape}".encode() + (b"" if value.dtype.hasobject else value.tobytes()))
    elif isinstance(value, (bool, int, float, str, bytes)) or value is None:
        digest.update(repr(value).encode())
    elif isinstance(value, Mapping):
        for key in value:
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(digest, item)
    else:
        digest.update(type(value).__qualname__.encode())


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
