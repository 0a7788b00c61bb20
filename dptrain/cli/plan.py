"""`dptrain plan RUN`: time and cost of a training on other numbers of GPUs, from one measured run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dptrain.checkpoint.store import load_newest
from dptrain.errors import ConfigError
from dptrain.explain.figures.plan_figure import draw_plan
from dptrain.explain.model.devices import LATENCY_S, devices
from dptrain.explain.model.exchange_plan import plan_exchange
from dptrain.explain.model.plan import OptimalSize, Plan, make_plan
from dptrain.explain.model.planner import Point
from dptrain.explain.record import RunRecord, read_run
from dptrain.explain.text import plan_text
from dptrain.explain.text.exchange_text import exchange_sentences, exchange_table
from dptrain.explain.text.findings import short
from dptrain.tracking.run_folder import checkpoints_in

_ALL = "1,2,4,...,4096"
_MOST_NUMBERS = 100
_PLAIN_WIDTH = 150
"""Columns of a table that goes to a file or a pipe, whose width nobody can ask for."""

_DESCRIPTION = """Time, compute and cost to a target loss on each number of GPUs, from one run that measured its noise
scale and its step times. Writes plan.png and plan.json into the run folder."""


def plan(arguments: Sequence[str]) -> int:
    """Make the plan, write it into the run folder, and print it.

    Raises:
        ConfigError: if the run lacks what a plan needs, or its folder cannot be written.
    """
    options = _parser().parse_args(arguments)
    record = read_run(options.run)
    if options.bandwidth_mbit_per_s is not None:
        return _plan_exchange(record, options)
    found = make_plan(
        record,
        devices(
            record,
            gradient_bytes=_gradient_bytes(options.run),
            gb_per_s=options.allreduce_gb_per_s,
            latency_s=1e-6 * options.allreduce_latency_us,
        ),
        numbers=options.gpus,
        target=options.target,
        price_per_device_hour=options.price_per_gpu_hour,
        flops_budget=options.flops_budget,
    )
    text = json.dumps(to_json(found), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    picture = options.run / "plan.png"
    try:
        (options.run / "plan.json").write_text(text, encoding="utf-8")
        draw_plan(found, picture)
        if options.json not in (None, "-"):
            Path(options.json).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or picture}: {error.strerror or error}") from error
    show(found, console=_console(stderr=options.json == "-"), picture=picture)
    if options.json == "-":
        sys.stdout.write(text)
    return 0


def _plan_exchange(record: RunRecord, options: argparse.Namespace) -> int:
    """Print which kinds of exchange pay on a network."""
    found = plan_exchange(
        record,
        _shapes(options.run),
        mbit_per_s=options.bandwidth_mbit_per_s,
        delay_s=1e-3 * options.delay_ms,
    )
    text = json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n"
    console = _console(stderr=options.json == "-")
    console.print(exchange_table(found))
    for sentence in exchange_sentences(found):
        console.print(sentence, highlight=False, markup=False)
    if options.json == "-":
        sys.stdout.write(text)
    elif options.json is not None:
        try:
            Path(options.json).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {options.json}: {error.strerror or error}") from error
    return 0


def _shapes(run_dir: Path) -> dict[str, tuple[list[int], torch.dtype]]:
    """Return the form of each entry of the model in a run's newest checkpoint."""
    checkpoint = load_newest(checkpoints_in(run_dir))
    if checkpoint is None:
        raise ConfigError(f"there is no checkpoint in {run_dir}, from which the size of the gradients is read")
    tensors = checkpoint.tensors("model")
    return {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}


def to_json(found: Plan) -> dict[str, Any]:
    """Return a plan as plain values, with its sentences."""
    return {
        "finding": plan_text.headline(found),
        "goal": plan_text.goal(found),
        "doubt": plan_text.doubt(found),
        "caveat": plan_text.NO_OPTIMUM,
        **asdict(found),
        "compute_disagreement": found.compute_of_run.disagreement,
    }


def show(found: Plan, *, console: Console, picture: Path) -> None:
    """Print a plan for people."""
    console.print(_table(found))
    sentences = [
        plan_text.headline(found),
        plan_text.doubt(found),
        plan_text.trade_off(found),
        plan_text.compute(found),
    ]
    for sentence in [*sentences, plan_text.step_times(found), *found.warnings, *map(_size, found.optimal_sizes)]:
        console.print(f"{sentence[0].upper()}{sentence[1:]}.", highlight=False, markup=False)
    console.print(plan_text.NO_OPTIMUM, highlight=False, markup=False)
    console.print(f"picture: {picture}", highlight=False, markup=False, soft_wrap=True)


def _size(size: OptimalSize) -> str:
    return (
        f"Compute-optimal by {size.law}: {size.num_parameters:.3g} parameters, {size.num_tokens:.3g} tokens "
        f"({size.num_tokens / size.num_parameters:.3g} per parameter), loss {size.loss:.3f} nats per token"
    )


def _table(found: Plan) -> Table:
    table = Table(title=plan_text.goal(found), caption=f"bold: the run's own number of {found.device}s")
    columns = _columns(found)
    for head in columns:
        table.add_column(head, justify="right")
    for point in found.points:
        style = "bold" if point.num_devices == found.own_devices else None
        table.add_row(*(cell(point) for cell in columns.values()), style=style)
    return table


def _columns(found: Plan) -> dict[str, Callable[[Point], str]]:
    """Return what the table shows of a point, under which head; not what the run does not tell."""
    columns: dict[str, Callable[[Point], str]] = {
        f"{found.device}s": lambda point: f"{point.num_devices:,}",
        "batch": lambda point: f"{point.global_batch_size:,}",
        "micro × acc.": lambda point: f"{point.micro_batch_size:,} × {point.accumulation_steps:,}",
        "steps": lambda point: short(point.steps),
        "samples": lambda point: short(point.samples),
        "time": lambda point: plan_text.about(point.seconds),
        "interval and fits": lambda point: _range(point.seconds_range),
        "noise scale off by 6×": lambda point: _range(point.seconds_history),
        "cost": lambda point: plan_text.price(found, point),
    }
    first = found.points[0]
    if first.compute.by_count is not None:
        columns["PF/s-days, counted"] = lambda point: plan_text.petaflop_s_days(point.compute.by_count)
    if first.compute.by_time is not None:
        columns["PF/s-days by time"] = lambda point: plan_text.petaflop_s_days(point.compute.by_time)
    if first.energy_j is not None:
        columns["energy"] = lambda point: plan_text.energy(point.energy_j or 0.0)
    return columns


def _range(ends: tuple[float, float]) -> str:
    return " – ".join(map(plan_text.about, ends))


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_PLAIN_WIDTH)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dptrain plan", description=_DESCRIPTION)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, such as runs/pysource-20260101-120000")
    parser.add_argument(
        "--gpus", type=numbers, metavar="LIST", help=f"numbers of GPUs (default {_ALL}, as far as the data set allows)"
    )
    parser.add_argument("--target", type=float, metavar="LOSS", help="target loss (default: the lowest of the run)")
    parser.add_argument("--price-per-gpu-hour", type=_positive, metavar="X", help="price per GPU-hour, any currency")
    parser.add_argument(
        "--allreduce-gb-per-s",
        type=_positive,
        metavar="X",
        help="all-reduce bandwidth between two GPUs in GB/s (default: estimated from the run)",
    )
    parser.add_argument(
        "--allreduce-latency-us",
        type=_positive,
        default=1e6 * LATENCY_S,
        metavar="X",
        help="all-reduce latency per hop in µs (default %(default)g)",
    )
    parser.add_argument(
        "--bandwidth-mbit-per-s",
        type=_positive,
        metavar="X",
        help="instead of the plan: which kinds of exchange pay on a network of X Mbit/s for each replica",
    )
    parser.add_argument(
        "--delay-ms", type=_positive, default=0.05, metavar="X", help="its delay, one way (default %(default)g)"
    )
    parser.add_argument(
        "--flops-budget", type=_positive, metavar="X", help="compute budget: prints compute-optimal model sizes"
    )
    parser.add_argument("--json", metavar="PATH|-", help="also write plan.json there (- for stdout)")
    return parser


def numbers(text: str) -> list[int]:
    """Read a list of numbers; dots stand for a row that goes on by its last factor: "1,2,4,...,4096".

    Raises:
        argparse.ArgumentTypeError: where it is none.
    """
    found: list[int] = []
    parts = [part.strip() for part in text.replace("…", "...").split(",")]
    try:
        for index, part in enumerate(parts):
            found += _between(found, int(parts[index + 1])) if part == "..." else [int(part)]
    except (ValueError, IndexError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,2,8 or {_ALL}") from None
    if not found or min(found) < 1 or len(found) > _MOST_NUMBERS:
        raise argparse.ArgumentTypeError(f"{text!r}: from 1 to {_MOST_NUMBERS} numbers, each at least 1")
    return found


def _between(before: list[int], last: int) -> list[int]:
    """Return what stands for the dots between numbers and the one after the dots."""
    first, second = before[-2:]
    if not (0 < first < second and second % first == 0):
        raise ValueError
    factor, row = second // first, [second * (second // first)]
    while row[-1] * factor <= last:
        row.append(row[-1] * factor)
    return [number for number in row if number < last]


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _gradient_bytes(run_dir: Path) -> float | None:
    """Return the size of a run's gradients, as that of the weights in its newest checkpoint; None without one."""
    found = sorted((run_dir / "checkpoints").glob("step-*/model.safetensors"))
    return float(found[-1].stat().st_size) if found else None
