"""What it costs to be careful: the share of a step that guards take, and of the training time that checkpoints take."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.replicas import run_replicas
from dptrain.checkpoint.async_writer import AsyncWriter
from dptrain.checkpoint.interval import young_daly_s
from dptrain.checkpoint.settings import CheckpointConfig
from dptrain.checkpoint.state import pack_model, pack_optimizer
from dptrain.observe import NUM_SUMS
from dptrain.observe.measurement_interval import NUM_TIMINGS
from dptrain.observe.reduction import PendingSum
from dptrain.runtime.replica_check import ReplicaCheck
from dptrain.runtime.step_reduction import RankReport, StepRecord, receive, send
from dptrain.runtime.watchdog import Watchdog
from dptrain.train import OptimizerConfig
from dptrain.train.optimizer import build_optimizer

_DRIFT_EVERY = 100
_TOKENS = 64
_WIDTH, _NUM_BLOCKS = 416, 6
"""12 million parameters."""


def guard_share(*, quick: bool) -> float:
    """Return what agreement, drift comparison and watchdog add to a step, as a share of it.

    Two replicas with 12 million parameters take 256 tokens each per step, which is little. What the guards add is
    timed by itself, in the median of many repetitions: against a step it would drown in the step's own noise. Of the
    step's reduction only what is more than the meter's own sums counts.
    """
    return float(run_replicas(_guard_share, world_size=2, args=(3 if quick else 15,)))


def _guard_share(rank: int, world_size: int, repetitions: int) -> float:  # noqa: ARG001 - how replicas are called
    model = _network()
    ddp = nn.parallel.DistributedDataParallel(model)
    samples = torch.randn(4, _TOKENS, _WIDTH)
    step_s = _median_s(lambda: ddp(samples).square().mean().backward(), repetitions=repetitions)
    drift = ReplicaCheck(model.named_parameters(), every_steps=1)

    def compare() -> None:
        drift.start(1)
        drift.finish()

    record = StepRecord(step=1, position=0, global_batch_size=8, micro_batch_size=4, learning_rate=0.1, wall_s=0.0)
    sums = torch.ones(NUM_SUMS + NUM_TIMINGS, dtype=torch.float64)
    found: dict[str, Any] = {"loss_sum": torch.zeros(()), "num_samples": 4, "grad_norm": torch.ones(())}
    full_s = _median_s(
        lambda: receive(send(record, report=RankReport(), meter_sums=sums, measured=True, **found), record),
        repetitions=300,
    )
    bare_s = _median_s(lambda: PendingSum(sums.clone()).read(), repetitions=300)
    watchdog = Watchdog(world_size=world_size)
    with watchdog:
        beat_s = _median_s(watchdog.beat, repetitions=300)
    drift_s = _median_s(compare, repetitions=repetitions)
    added_s = max(full_s - bare_s, 0.0) + beat_s + drift_s / _DRIFT_EVERY
    shares = torch.tensor([added_s / step_s], dtype=torch.float64)
    dist.all_reduce(shares)
    return float(shares) / world_size


def stall_share(*, quick: bool) -> float:
    """Return the share of training time for which checkpoints hold training up, at the default interval.

    Twelve million parameters with AdamW's moments, 150 MB in all, in the median of several saves after the first.
    """
    model = _network()
    optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-3), model)
    model(torch.randn(1, 2, _WIDTH)).square().mean().backward()
    optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    stalls: list[float] = []
    with tempfile.TemporaryDirectory() as folder, AsyncWriter(Path(folder), keep=1) as writer:
        for step in range(1, 4 if quick else 10):
            began_s = time.perf_counter()
            tensors, state = pack_optimizer(optimizer, names=names)
            packed: dict[str, Any] = {"model": pack_model(model), "optimizer": tensors}
            writer.save(step=step, tensors=packed, state={"optimizer": state})
            stalls.append(time.perf_counter() - began_s)
            writer.wait()
        write_s = writer.status().write_s
    stall_s = statistics.median(stalls[1:])
    failures_s = 3600 * CheckpointConfig().hours_between_failures
    return stall_s / young_daly_s(stall_s=stall_s, write_s=write_s, mean_time_between_failures_s=failures_s)


def _network() -> nn.Module:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(_WIDTH, 8, 4 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, _NUM_BLOCKS, enable_nested_tensor=False)


def _median_s(action: Callable[[], object], *, repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions + 1):
        began_s = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds[1:])
