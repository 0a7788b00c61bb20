"""`dptrain bench`: speed, memory and all-reduce bandwidth of a task's training step."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dptrain.config.train_config import TrainConfig
from dptrain.errors import ConfigError

if TYPE_CHECKING:
    from dptrain.data import MicroBatchLoader
    from dptrain.runtime.step_reduction import StepRecord
    from dptrain.train.step import Stepper

_DESCRIPTION = """Take some steps of a task on all replicas and print how fast they are; nothing is kept. What is not an
option below is a setting of `dptrain train`, such as --task or --execution.compile."""
_WARM_UP = 10
_FEWEST_FOR_PARTS = 6
_NEVER = 10**9
_SIZES = (2**10, 2**14, 2**18, 2**22)
_ALL_REDUCES = 10
_kept: list[object] = []
"""What must not go before the process does, see `end_replica`."""


def bench(arguments: Sequence[str]) -> int:
    """Measure as a replica where a launcher started this process, else start the replicas.

    Raises:
        ConfigError: where a setting is wrong.
    """
    from dptrain.cli.settings import parse
    from dptrain.runtime.failure_report import write_outcome
    from dptrain.runtime.launcher import GRACE_S, count_gpus, is_replica, start_replicas
    from dptrain.tracking.run_folder import write_config

    parser = argparse.ArgumentParser(prog="dptrain bench", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "--steps", type=int, default=50, help="steps that are timed, after 10 that are not (default 50)"
    )
    parser.add_argument(
        "--dry-run-replicas",
        "--dry_run_replicas",
        type=int,
        help="be rank 0 of so many replicas that do not exist: layout, memory and this rank's own time, without "
        "communication",
    )
    own, rest = parser.parse_known_args(arguments)
    if own.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {own.steps}")
    config, options = parse(rest)
    if own.dry_run_replicas is not None:
        if own.dry_run_replicas < 1:
            raise ConfigError(f"--dry-run-replicas must be at least 1, got {own.dry_run_replicas}")
        if config.noise.observer == "hook":
            raise ConfigError(
                "--dry-run-replicas needs DDP's one communication hook for itself: use noise.observer=parameters"
            )
        if config.execution.expert_parallel_size > 1:
            raise ConfigError(
                "--dry-run-replicas cannot know how many tokens other replicas would send to the experts of this one: "
                "leave execution.expert_parallel_size out"
            )
        if options.replicas is not None or is_replica():
            raise ConfigError("--dry-run-replicas runs in one process: leave --replicas and the launcher out")
        _dry_run(config, num_steps=own.steps, num_replicas=own.dry_run_replicas)
        return 0
    if is_replica():
        _measure(config, num_steps=own.steps)
        write_outcome(0)  # an exit code alone says nothing to the launcher: a task may have ended the process
        return 0
    num_gpus = count_gpus(cpu=config.device == "cpu")
    with tempfile.TemporaryDirectory(prefix="dptrain-") as folder:
        path = Path(folder) / "config.yaml"
        write_config(path, replace(config, run_dir=f"{folder}/run"))
        return start_replicas(
            ["bench", "--config", str(path), "--steps", str(own.steps)],
            num_replicas=(num_gpus or 2) if options.replicas is None else options.replicas,
            run_dir=Path(folder) / "run",
            max_restarts=0,
            grace_s=GRACE_S,
            fork=num_gpus == 0,
        )


def _dry_run(config: TrainConfig, *, num_steps: int, num_replicas: int) -> None:
    from dptrain.cli.operations.dry_run import pretended_replicas

    with tempfile.TemporaryDirectory(prefix="dptrain-") as folder, pretended_replicas(num_replicas):
        # Gathered shards hold anything, and with them the gradient.
        optimizer = replace(config.optimizer, max_skipped_steps=_NEVER)
        found = _run(
            replace(config, run_dir=f"{folder}/run", optimizer=optimizer),
            num_steps=num_steps,
            pretends=num_replicas > 1,
        )
        sys.stdout.write(
            f"dry run       rank 0 of {num_replicas:,}; the others do not exist, nothing is communicated\n"
        )
        _print(config, found)


def _measure(config: TrainConfig, *, num_steps: int) -> None:
    import torch
    import torch.distributed as dist

    from dptrain.runtime.rendezvous import rendezvous

    rendezvous(device=config.device, share_devices=config.execution.share_devices)
    try:
        found = _run(config, num_steps=num_steps)
        bandwidths = _all_reduce_bandwidths(torch.device("cuda") if found.on_gpu else torch.device("cpu"))
        if dist.get_rank() == 0:
            _print(config, found, bandwidths)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the steps of a bench showed.

    Attributes:
        seconds: of each timed step.
        samples: in all of them.
        layout: of a step, in words.
        peak_bytes: of memory on this rank.
        flops_per_sample: of a forward and backward pass; None where none were counted.
        shares: of the parts of a step.
        on_gpu: whether it ran on one.
    """

    seconds: list[float]
    samples: int
    layout: str
    peak_bytes: int
    flops_per_sample: float | None
    shares: Mapping[str, float | None]
    on_gpu: bool


def _run(config: TrainConfig, *, num_steps: int, pretends: bool = False) -> _Found:
    """Take the steps, first as they are, then with their parts timed."""
    import torch
    import torch.distributed as dist

    from dptrain.cli.operations.dry_run import answer_for_others
    from dptrain.train import Trainer
    from dptrain.train.execution.phases import Phases

    config = replace(
        config,
        log=replace(config.log, tracker="none", print_every_steps=_NEVER, eval_every_samples=_NEVER),
        checkpoint=replace(config.checkpoint, every_samples=_NEVER),
        control=replace(config.control, law="constant") if config.control.mode == "adapt" else config.control,
        max_samples=_NEVER,
        max_steps=None,
        max_tokens=None,
        replica_check_every_steps=0,
    )
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    phases = Phases(torch.device("cuda" if on_gpu else "cpu"))

    class Timed(Trainer):
        timed: Stepper

        def _stepper(self, loader: MicroBatchLoader) -> Stepper:
            if pretends:
                answer_for_others(self._model)
            self.timed = super()._stepper(loader)
            return self.timed

    seconds, samples = [], 0
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Timed(config)
        _kept.append(trainer)
        steps = trainer.steps()

        def one_step() -> tuple[float, StepRecord]:
            began_s = time.perf_counter()
            record = next(steps)
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - began_s, record

        for _ in range(_WARM_UP):
            one_step()
        for _ in range(num_steps):
            taken_s, record = one_step()
            seconds.append(taken_s)
            samples += record.global_batch_size
        # Parts are timed after the step as a whole, which they make longer.
        phases.attach(trainer.timed)
        for _ in range(max(num_steps, _FEWEST_FOR_PARTS)):
            phases.step(one_step()[0])
        steps.close()
    replicas = dist.get_world_size()
    return _Found(
        seconds=seconds,
        samples=samples,
        layout=f"{record.global_batch_size:,} samples = {record.micro_batch_size:,} a micro-batch × "
        f"{record.micro_steps(replicas):,} accumulation × {replicas:,} replicas",
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else _resident_bytes(),
        flops_per_sample=phases.flops_per_sample,
        shares=phases.shares(),
        on_gpu=on_gpu,
    )


def _print(config: TrainConfig, found: _Found, bandwidths: Mapping[int, float] | None = None) -> None:
    speed = found.samples / sum(found.seconds)
    lines = [
        f"batch         {found.layout}",
        *_lines(found.seconds, found.samples, found.peak_bytes, bandwidths or {}),
        _flops_line(config, found.flops_per_sample, speed, on_gpu=found.on_gpu),
        _shares_line(found.shares),
    ]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _lines(seconds: list[float], samples: int, peak_bytes: int, bandwidths: Mapping[int, float]) -> list[str]:
    ordered = sorted(seconds)
    shares = {name: ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] for name, share in _SHARES}
    return [
        f"throughput    {samples / sum(seconds):,.1f} samples/s",
        f"step time     median {1e3 * statistics.median(seconds):.2f} ms, "
        + ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in shares.items()),
        f"memory        {peak_bytes / 2**20:,.0f} MiB on rank 0",
        *(f"all-reduce    {size * 4 / 2**10:,.0f} KiB: {rate / 1e9:.3f} GB/s" for size, rate in bandwidths.items()),
    ]


def _flops_line(config: TrainConfig, flops_per_sample: float | None, samples_per_s: float, *, on_gpu: bool) -> str:
    """Return the model FLOPs utilisation of a device, or why it is not known."""
    import torch
    import torch.distributed as dist

    from dptrain.cost.device_peaks import matmul_precision, peak_flops_per_s

    if flops_per_sample is None:
        return "mfu           not known: no FLOPs were counted"
    per_device = flops_per_sample * samples_per_s / dist.get_world_size()
    device = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name() if on_gpu else None
    peak = peak_flops_per_s(name, precision=matmul_precision(device, mixed_precision=config.precision))
    speed = f"{per_device:.3g} FLOP/s per replica"
    if peak is None:
        return f"mfu           not known: no peak is on record for {name or 'this CPU'} ({speed})"
    return f"mfu           {per_device / peak:.1%} of {peak / 1e12:,.0f} TFLOP/s ({speed})"


def _shares_line(shares: Mapping[str, float | None]) -> str:
    """Return how the time of a step is divided."""
    texts = [f"{name} {share:.1%}" for name, share in shares.items() if share is not None]
    unknown = ", communication is in backward and optimizer" if shares["communication"] is None else ""
    return f"step          {', '.join(texts)}{unknown}"


_SHARES = (("p90", 0.9), ("p99", 0.99))


def _all_reduce_bandwidths(device: object) -> dict[int, float]:
    """Return bus bytes per second by number of float32 values: 2·(n − 1)/n of the message, as nccl-tests counts."""
    import torch
    import torch.distributed as dist

    found = {}
    world_size = dist.get_world_size()
    for size in _SIZES if world_size > 1 else ():
        values = torch.ones(size, device=device)  # type: ignore[call-overload] # a device
        dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(_ALL_REDUCES):
            dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        taken_s = (time.perf_counter() - began_s) / _ALL_REDUCES
        found[size] = 4 * size * 2 * (world_size - 1) / world_size / taken_s
    return found


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
