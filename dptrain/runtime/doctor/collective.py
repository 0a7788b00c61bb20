"""How fast the ranks all-reduce: latency of a small tensor, bandwidth of a large one; makes and drops a group."""

from __future__ import annotations

import datetime as dt
import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined] # not in __all__

from dptrain.runtime.doctor.finding import Finding, Status

_NUM_SMALL, _NUM_LARGE = 20, 3
_LARGE_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}
_SLOW_BYTES_PER_S = (
    1e9  # GPUs on several hosts: a 10 Gbit/s link; the gradients of 1e9 parameters then take 4 s and more
)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured.

    Attributes:
        latency_s: median time of an all-reduce of 8 bytes.
        bus_bytes_per_s: what each link carried: bytes × 2 (n-1)/n over the time, as the NCCL tests define it.
    """

    latency_s: float
    bus_bytes_per_s: float


def measure(store: Store, *, rank: int, world_size: int, local_rank: int, on_gpu: bool, limit_s: float) -> Speed:
    """Make a group of all ranks, all-reduce, and drop it. A collective.

    Raises:
        RuntimeError: where the group cannot be made, or a rank does not answer within `limit_s`.
    """
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",  # with NCCL: not run on a GPU
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=dt.timedelta(seconds=limit_s),
    )
    try:
        small = torch.ones(1, dtype=torch.float64, device=device)
        large = torch.ones(_LARGE_BYTES[device.type] // 4, device=device)
        latency_s = _median_s(small, repeats=_NUM_SMALL)
        seconds = _median_s(large, repeats=_NUM_LARGE)
        expected = float(world_size) ** (_NUM_LARGE + 1)  # the warm-up counts
        if not math.isclose(float(large[0]), expected, rel_tol=1e-4):
            raise RuntimeError(f"an all-reduce of ones gave {float(large[0]):g} instead of {expected:g}")
    finally:
        dist.destroy_process_group()
    per_link = 2 * (world_size - 1) / world_size
    return Speed(latency_s=latency_s, bus_bytes_per_s=large.nbytes * per_link / seconds)


def judge_speed(speed: Speed, *, world_size: int, num_hosts: int, on_gpu: bool) -> Finding:
    """Return the finding on what was measured."""
    text = (
        f"{world_size} ranks on {num_hosts} host{'s' if num_hosts > 1 else ''} by {'NCCL' if on_gpu else 'gloo'}: "
        f"latency {speed.latency_s * 1e6:,.0f} µs, bandwidth {speed.bus_bytes_per_s / 1e9:.3g} GB/s"
    )
    figures = {"latency_s": speed.latency_s, "bus_bytes_per_s": speed.bus_bytes_per_s}
    if on_gpu and num_hosts > 1 and speed.bus_bytes_per_s < _SLOW_BYTES_PER_S:
        remedy = (
            "see with NCCL_DEBUG=INFO whether NCCL uses the fast network; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it"
        )
        return Finding(check="all-reduce", status=Status.WARNING, text=f"slow: {text}", remedy=remedy, figures=figures)
    return Finding(check="all-reduce", text=text, figures=figures)


def _median_s(tensor: torch.Tensor, *, repeats: int) -> float:
    """Return the median time of an all-reduce, after one that makes the connections."""
    took = []
    for _ in range(repeats + 1):
        began_s = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        took.append(time.perf_counter() - began_s)
    return statistics.median(took[1:])
