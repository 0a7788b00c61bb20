"""The models that the overhead benchmark trains, and one of them measured as a replica of a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.overhead.variants import Case, Limits, measure_variants

_2M: dict[str, Any] = {"parameters": "2M", "num_blocks": 4, "width": 208}
_12M: dict[str, Any] = {"parameters": "12M", "num_blocks": 6, "width": 416}
_50M: dict[str, Any] = {"parameters": "50M", "num_blocks": 8, "width": 720}

# Heavy is still little: 512 tokens to 12 M parameters are an eighth of what one GPU is given. Light is the worst case.
CASES = (
    Case(**_2M, compute="light", num_tokens=8),
    Case(**_2M, compute="heavy", num_tokens=64),
    Case(**_12M, compute="light", num_tokens=8),
    Case(**_12M, compute="heavy", num_tokens=128),
    Case(**_50M, compute="light", num_tokens=4),
    Case(**_50M, compute="heavy", num_tokens=32),
    Case(**_2M, compute="accumulation", num_tokens=16, accumulation_steps=4, world_size=1, in_ddp=False),
)
QUICK_CASES = (CASES[0], CASES[-1])


def has_replicas_on_cuda() -> bool:
    """NCCL takes one replica per device."""
    return torch.cuda.device_count() >= max(case.world_size for case in CASES)


def measure_case(rank: int, world_size: int, case: Case, limits: Limits, folder: str) -> list[dict[str, Any]]:
    """Measure one case as one of its replicas; rank 0 returns the rows."""
    if not has_replicas_on_cuda():
        return measure_variants(case, device=torch.device("cpu"), limits=limits)
    dist.destroy_process_group()
    torch.cuda.set_device(rank)
    store = f"file://{Path(folder) / 'store'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=store, rank=rank, world_size=world_size)
    return measure_variants(case, device=torch.device("cuda", rank), limits=limits)
