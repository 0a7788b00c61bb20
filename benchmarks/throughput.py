"""How fast is a step of the trainer beside a hand-written DDP loop and other frameworks?"""
# python -m benchmarks.throughput [--json PATH|-] [--quick] [--case NAME]

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import dptrain
from benchmarks import harness
from benchmarks.framework_loops import (
    ACCELERATE,
    DPTRAIN,
    HAND,
    LIGHTNING,
    TRANSFORMERS,
    Problem,
    make_loop,
)
from benchmarks.replicas import run_replicas
from dptrain.data import MicroBatchLoader, SampleStream
from dptrain.data.token_files import TokenWindows, token_file
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.tasks import Suggestion, Task
from dptrain.tasks.digits import digits
from dptrain.tasks.gpt import language_task

FRAMEWORKS = (HAND, ACCELERATE, LIGHTNING, TRANSFORMERS, DPTRAIN)
_REPLICAS = 2
_SETTLE = 60

GPTS = {
    "gpt tiny": GptConfig(),
    "gpt 12M": GptConfig(vocab_size=4096, context=128, width=384, depth=6, heads=6, tied=True),
    "gpt 50M": GptConfig(vocab_size=8192, context=128, width=672, depth=8, heads=7, tied=True),
}
MLP = "mlp"
_MICRO_BATCH = {"gpt tiny": 8, "gpt 12M": 4, "gpt 50M": 2, MLP: 8}
_SECONDS = {MLP: 60.0, "gpt tiny": 120.0, "gpt 12M": 180.0, "gpt 50M": 420.0}
_QUICK_SECONDS = 8.0


def problem(name: str) -> Problem:
    """Return what is trained under that name."""
    build = digits if name == MLP else partial(_gpt, name)
    return Problem(name=name, build=build, micro_batch_size=_MICRO_BATCH[name])


def _gpt(name: str) -> Task:
    torch.manual_seed(0)
    config = GPTS[name]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, size=400_000).astype(np.uint16)
    suggestion = Suggestion(
        learning_rate=1e-3, global_batch_size=16, micro_batch_size=8, max_samples=10**6, eval_every_samples=10**6
    )
    train = TokenWindows([tokens], size=config.context + 1)
    held_out = TokenWindows([tokens[: 4 * config.context + 4]], size=config.context + 1)
    return language_task(name, Gpt(config), train=train, held_out=held_out, suggestion=suggestion, is_bytes=False)


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


def measure_case(rank: int, world_size: int, name: str, seconds: float) -> list[dict[str, Any]]:  # noqa: ARG001 - how replicas are called
    """Return a row for each framework."""
    found = problem(name)
    every = _settled_interval(found, rank=rank)
    with tempfile.TemporaryDirectory() as folder:
        loops = {}
        for framework in FRAMEWORKS:
            own = Path(folder) / f"{framework.replace(' ', '-')}-{rank}"
            own.mkdir()
            loops[framework] = make_loop(framework, found, folder=own, every=every)
        first_s = _turn(loops[HAND], 3)[0] / 3
        steps = max(1, min(50, round(0.25 / first_s)))
        for loop in loops.values():
            _turn(loop, max(4, steps))
        turns = _turns(loops, steps=steps, seconds=seconds)
    return _rows(name, turns, steps=steps)


def _turns(loops: dict[str, Any], *, steps: int, seconds: float) -> list[dict[str, tuple[float, float]]]:
    """Return for each round the (wall, CPU) seconds of each loop's turn."""
    rounds: list[dict[str, tuple[float, float]]] = []
    ends_s = time.perf_counter() + seconds
    order = list(loops)
    going = torch.ones(())
    while len(rounds) < 3 or going.item():
        order = [*order[1:], order[0]]
        rounds.append({name: _turn(loops[name], steps) for name in order})
        going = torch.tensor(float(time.perf_counter() < ends_s))
        torch.distributed.broadcast(going, src=0)
    return rounds


def _turn(loop: Any, steps: int) -> tuple[float, float]:  # noqa: ANN401 - an iterator
    torch.distributed.barrier()
    began_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(steps):
        next(loop)
    return time.perf_counter() - began_s, time.process_time() - cpu_s


def _rows(case: str, rounds: list[dict[str, tuple[float, float]]], *, steps: int) -> list[dict[str, Any]]:
    rows = []
    for name in FRAMEWORKS:
        wall_s, cpu_s = (statistics.median(found[name][index] for found in rounds) / steps for index in (0, 1))
        speed = statistics.median(found[HAND][0] / found[name][0] for found in rounds)
        cpu = statistics.median(found[name][1] / found[HAND][1] for found in rounds)
        row = {"case": case, "framework": name, "rounds": len(rounds), "ms": 1e3 * wall_s, "cpu_ms": 1e3 * cpu_s}
        rows.append({**row, "speed": speed, "cpu": cpu})
    return rows


def _settled_interval(found: Problem, *, rank: int) -> int:
    """Return the interval that the meter chooses in a loop that nothing interrupts."""
    task = found.build()
    model = DistributedDataParallel(task.model)
    data: Any = task.train_data
    batch = torch.utils.data.default_collate(
        [data[rank * found.micro_batch_size + index] for index in range(found.micro_batch_size)]
    )
    with dptrain.attach(model, micro_batch_size=found.micro_batch_size) as meter:
        for _ in range(_SETTLE):
            loss: Any = task.loss(model, batch)
            loss.backward()
            meter.step()
            model.zero_grad()
        return meter.every


# Start-up

_HAND_SCRIPT = """
import torch, torch.distributed as dist
from benchmarks.framework_loops import _hand_written
from benchmarks.throughput import problem
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
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
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
