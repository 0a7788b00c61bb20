"""What the frameworks train, and one case of it measured as a replica: the loops in turns, and a row for each."""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import dptrain
from benchmarks.throughput.framework_loops import (
    ACCELERATE,
    DPTRAIN,
    HAND,
    LIGHTNING,
    TRANSFORMERS,
    Problem,
    make_loop,
)
from dptrain.data.token_files import TokenWindows
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.tasks import Suggestion, Task
from dptrain.tasks.digits import digits
from dptrain.tasks.gpt import language_task

FRAMEWORKS = (HAND, ACCELERATE, LIGHTNING, TRANSFORMERS, DPTRAIN)
_SETTLE = 60

GPTS = {
    "gpt tiny": GptConfig(),
    "gpt 12M": GptConfig(vocab_size=4096, context=128, width=384, depth=6, heads=6, tied=True),
    "gpt 50M": GptConfig(vocab_size=8192, context=128, width=672, depth=8, heads=7, tied=True),
}
MLP = "mlp"
_MICRO_BATCH = {"gpt tiny": 8, "gpt 12M": 4, "gpt 50M": 2, MLP: 8}


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
