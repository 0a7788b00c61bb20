"""How fast is a step of the trainer beside a hand-written DDP loop and other frameworks?"""
# python -m benchmarks.throughput [--json PATH|-] [--quick] [--case NAME]

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.replicas import run_replicas
from benchmarks.throughput.framework_loops import DPTRAIN, HAND
from benchmarks.throughput.turns import FRAMEWORKS, GPTS, MLP, measure_case
from dptrain.data import MicroBatchLoader, SampleStream
from dptrain.data.token_files import TokenWindows, token_file

ROOT = Path(__file__).parents[2]
_REPLICAS = 2
_SECONDS = {MLP: 60.0, "gpt tiny": 120.0, "gpt 12M": 180.0, "gpt 50M": 420.0}
_QUICK_SECONDS = 8.0


def measure(quick: bool, cases: tuple[str, ...] = (MLP, *GPTS)) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Measure every case, one launch of processes each."""
    names = (MLP, "gpt tiny") if quick else cases
    rows: list[dict[str, Any]] = []
    for name in names:
        seconds = _QUICK_SECONDS if quick else _SECONDS[name]
        rows += run_replicas(measure_case, world_size=_REPLICAS, args=(name, seconds))
    figures = _figures(rows)
    figures["startup_over_ddp"] = startup_ratio(repetitions=1 if quick else 5)
    figures["tokens_read_over_nanogpt"] = read_ratio(seconds=2.0 if quick else 10.0)
    return harness.Findings(
        figures=figures,
        rows=rows,
        columns={
            "case": "{case}",
            "framework": "{framework}",
            "ms/step": "{ms:.2f}",
            "CPU ms/step": "{cpu_ms:.2f}",
            "speed / hand-written": "{speed:.3f}",
            "CPU / hand-written": "{cpu:.3f}",
        },
        note="Two gloo replicas, one thread each; loops in turns inside one process group, a turn is some steps; "
        "medians of the ratio to the hand-written loop's turn in the same round. dptrain measures at the interval that "
        "its meter chose, and all loops log every 50 steps.",
    )


def _figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    gpts = sorted({row["case"] for row in rows} - {MLP})
    speed = {(row["case"], row["framework"]): row["speed"] for row in rows}
    if gpts:
        figures["trainer_over_ddp_min"] = min(speed[case, DPTRAIN] for case in gpts)
        others = [name for name in FRAMEWORKS if name not in (HAND, DPTRAIN)]
        figures["trainer_over_best_framework_min"] = min(
            speed[case, DPTRAIN] / max(speed[case, name] for name in others if (case, name) in speed) for case in gpts
        )
    for row in rows:
        if row["case"] == MLP and row["framework"] == DPTRAIN:
            figures["mlp_cpu_over_ddp"] = row["cpu"]
    return figures


# Start-up

_HAND_SCRIPT = """
import torch, torch.distributed as dist
from benchmarks.throughput.framework_loops import _hand_written
from benchmarks.throughput.turns import problem
dist.init_process_group("gloo")
torch.set_num_threads(1)
next(_hand_written(problem("mlp")))
print("step 1", flush=True)
dist.destroy_process_group()
"""


def startup_ratio(*, repetitions: int) -> float:
    """Return the time from the command to the end of the first step, beside torchrun with the hand-written loop."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "loop.py"
        script.write_text(_HAND_SCRIPT, encoding="utf-8")
        by_hand = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        for number in range(repetitions):
            hand_s = _first_step_s(by_hand)
            ours = [sys.executable, "-m", "dptrain", "train", "--task", "digits", "--replicas", "2", "--device", "cpu"]
            ours += ["--max_samples", "32", "--log.tracker", "none", "--run_dir", f"{folder}/{number}"]
            ratios.append(_first_step_s(ours) / hand_s)
    return statistics.median(ratios)


def _first_step_s(command: list[str]) -> float:
    began_s = time.perf_counter()
    # A script finds what lies beside it, and not the folder that torchrun was started in.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        taken_s = 0.0
        for line in process.stdout:
            if "step 1" in line and not taken_s:
                taken_s = time.perf_counter() - began_s
        if process.wait() or not taken_s:
            raise RuntimeError(f"{' '.join(command)} ended without a first step")
    return taken_s


# Reading tokens


def read_ratio(*, seconds: float, context: int = 256, batch_size: int = 8) -> float:
    """Return the time to read a micro-batch of a memory-mapped file beside nanoGPT's `get_batch`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(0, 50_000, size=4_000_000).astype(np.uint16).tofile(path)
        windows = TokenWindows([token_file(path, dtype=None)], size=context + 1)
        stream = SampleStream(len(windows), seed=0)
        loader = MicroBatchLoader(windows, stream=stream, rank=0, world_size=1)

        def ours(number: int) -> object:
            position = number * batch_size
            return next(loader.window(position=position, global_batch_size=batch_size, micro_batch_size=batch_size))

        def theirs(_number: int) -> object:
            data = np.memmap(path, dtype=np.uint16, mode="r")
            starts = torch.randint(len(data) - context, (batch_size,))
            inputs = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in starts])
            targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in starts])
            return inputs, targets

        ratios: list[float] = []
        numbers = count()
        ends_s = time.perf_counter() + seconds
        while time.perf_counter() < ends_s:
            taken = []
            for read in (ours, theirs):
                began_s = time.process_time()
                for _ in range(50):
                    read(next(numbers) if read is theirs else len(ratios) * 50 + _)
                taken.append(time.process_time() - began_s)
            ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)


if __name__ == "__main__":
    parser = harness.command_line(question=__doc__, name="throughput")
    parser.add_argument("--case", choices=(MLP, *GPTS), help="only this one")
    options = parser.parse_args()
    chosen = (options.case,) if options.case else (MLP, *GPTS)
    harness.tell(measure(options.quick, chosen), options, question=__doc__, name="throughput", device="cpu")
