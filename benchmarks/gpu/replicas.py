"""Do two replicas that share one device over gloo train as one replica does?"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from benchmarks.gpu.models import TINY, Size, Windows, made_tokens, task_of
from benchmarks.gpu.rows import ON_GPU, Report, Row
from dptrain.tracking.jsonl import read_rows
from dptrain.train import ControlConfig, ExecutionConfig, LogConfig, NoiseConfig, TrainConfig, Trainer

_SIZE = Size(name="tiny", config=TINY, micro_batch_size=4, accumulation_steps=2)
_STEPS = 6


def measure(report: Report) -> None:
    """Train the same samples with 1 × 2 and 2 × 1 replicas × accumulation."""
    report.guarded("two gloo replicas on one device", _compare)


def _compare() -> Row:
    with tempfile.TemporaryDirectory() as folder:
        for world_size in (1, 2):
            context: Any = spawn(  # type: ignore[no-untyped-call]
                _train, args=(world_size, folder), nprocs=world_size, join=False, start_method="spawn"
            )
            while not context.join():
                pass
        runs = [Path(folder) / str(world_size) for world_size in (1, 2)]
        weights = [load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors") for run in runs]
        rows = [[row for row in read_rows(run / "metrics.jsonl") if row["kind"] == "train"] for run in runs]
    apart = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    traces = [[float(row.get("noise_scale/trace") or 0) for row in found] for found in rows]
    noise = max(abs(a / b - 1) for a, b in zip(*traces, strict=True) if b)
    ok = apart < 1e-4 and noise < 1e-2
    return {
        "ok": ok,
        "result": f"parameters differ by at most {apart:.1e}, tr(Σ) by {noise:.1e} after {_STEPS} steps",
        "figures": {"right": float(ok)},
    }


def _train(rank: int, world_size: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    backend = "cpu:gloo,cuda:gloo" if ON_GPU else "gloo"
    store = f"file://{folder}/store-{world_size}"
    torch.set_num_threads(1)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
    config = TrainConfig(
        run_dir=f"{folder}/{world_size}",
        global_batch_size=8,
        micro_batch_size=4,
        max_samples=8 * _STEPS,
        execution=ExecutionConfig(share_devices=True),
        control=ControlConfig(law="constant"),
        noise=NoiseConfig(every=1),
        log=LogConfig(tracker="none", print_every_steps=10**6),
    )
    data = Windows(made_tokens(vocab_size=TINY.vocab_size, num_tokens=100 * TINY.context), context=TINY.context)
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(config, task=task_of(_SIZE, data)).run()
    dist.destroy_process_group()
