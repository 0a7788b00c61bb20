"""Which device this replica trains on, and where it stands among the others."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from dptrain.config.train_config import TrainConfig


def replica_device(config: TrainConfig) -> torch.device:
    """Return this replica's device, and make it the present one.

    With `execution.share_devices` replicas take turns on the GPUs that there are.
    """
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if config.execution.share_devices:
        local_rank %= torch.cuda.device_count()
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def rank_of_replica() -> int:
    """Return the number of this replica; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def num_replicas() -> int:
    """Return the number of replicas; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_for_everyone(device: torch.device) -> None:
    """Wait until all replicas are here."""
    if num_replicas() > 1:
        dist.barrier(device_ids=[device.index] if dist.get_backend() == "nccl" else None)
