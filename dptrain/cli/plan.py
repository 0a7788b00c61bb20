"""`dptrain plan RUN`: time and cost of a training on other numbers of GPUs, from one measured run."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dptrain.cli.operations.exchange_plan import plan_exchange_of
from dptrain.cost.device_peaks import DEVICES, device_named, device_of
from dptrain.cost.prices import GPUHUNT, DevicePrice, PriceList, gpuhunt_prices, prices_of, shipped_prices
from dptrain.errors import ConfigError
from dptrain.explain.figures.plan_figure import draw_plan
from dptrain.explain.model.hardware.devices import LATENCY_S, Devices, devices
from dptrain.explain.model.hardware.other_devices import OtherDevices, other_devices
from dptrain.explain.model.model_sizes import OptimalSize
from dptrain.explain.model.plan import Plan, make_plan
from dptrain.explain.model.planner import Point
from dptrain.explain.record import RunRecord, read_run
from dptrain.explain.text import plan_text, rental_text
from dptrain.explain.text.findings import short
from dptrain.explain.text.rental_text import Answer

_ALL = "1,2,4,...,4096"
_MOST_NUMBERS = 100
_PLAIN_WIDTH = 150
"""Columns of a table that goes to a file or a pipe, whose width nobody can ask for."""

_ALL_DEVICES = "all"
_WITHIN, _BUDGET = "6h", 100.0
_SYMBOLS = {"USD": "$"}
_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "tf32": "tf32", "fp32": "float32"}
_TIME_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_TIME = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_TIME_UNITS_S)})")
_CURRENCY = re.compile(r"([A-Za-z$€£¥]{1,5})(?:=(.+))?")

_DESCRIPTION = """Time, compute and cost to a target loss on each number of GPUs, from one run that measured its noise
scale and its step times; with --device on GPUs that the run was not on. Writes plan.png and plan.json into the run
folder."""


@dataclass(frozen=True, kw_only=True)
class _Priced:
    """Prices of a plan, with where they are from.

    Attributes:
        prices: of each device by its short name; of the run's own device under None.
        currency: of them.
        minimum_rental_s: the shortest time that is billed.
        source: in words.
    """

    prices: dict[str | None, DevicePrice]
    currency: str
    minimum_rental_s: float
    source: str


def plan(arguments: Sequence[str]) -> int:
    """Make the plan, write it into the run folder, and print it.

    Raises:
        ConfigError: if the run lacks what a plan needs, or its folder cannot be written.
    """
    options = _parser().parse_args(arguments)
    record = read_run(options.run)
    if options.bandwidth_mbit_per_s is not None:
        return plan_exchange_of(record, options, console=_console(stderr=options.json == "-"))
    names = _devices_asked_for(options, record)
    priced = _prices(options, names)
    plans = [_plan(options, record, name=name, priced=priced) for name in names]
    answers = _answers(options, plans, priced=priced)
    found = plans[0]
    as_json = to_json(found, others=plans[1:], answers=answers)
    text = json.dumps(as_json, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    picture = options.run / "plan.png"
    try:
        (options.run / "plan.json").write_text(text, encoding="utf-8")
        draw_plan(found, picture)
        if options.json not in (None, "-"):
            Path(options.json).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename or picture}: {error.strerror or error}") from error
    console = _console(stderr=options.json == "-")
    show(found, console=console, picture=picture, others=plans[1:], answers=answers, budget=options.budget or _BUDGET)
    if options.json == "-":
        sys.stdout.write(text)
    return 0


def to_json(found: Plan, *, others: Sequence[Plan] = (), answers: Sequence[Answer] = ()) -> dict[str, Any]:
    """Return a plan as plain values, with its sentences; plans for further devices, and answers, beside it."""
    return {
        "finding": plan_text.headline(found),
        "goal": plan_text.goal(found),
        "doubt": plan_text.doubt(found),
        "caveat": plan_text.NO_OPTIMUM,
        "answers": [asdict(answer) for answer in answers],
        **asdict(found),
        "compute_disagreement": found.compute_of_run.disagreement,
        "other_devices": [asdict(other) for other in others],
    }


def show(
    found: Plan,
    *,
    console: Console,
    picture: Path,
    others: Sequence[Plan] = (),
    answers: Sequence[Answer] = (),
    budget: float = _BUDGET,
) -> None:
    """Print a plan for people."""
    console.print(_table(found))
    if others:
        console.print(_comparison([found, *others]))
    for answer in answers:
        console.print(answer.question, highlight=False, markup=False, style="bold")
        console.print(f"{answer.answer}. {answer.assumes}.", highlight=False, markup=False)
    sentences = [
        plan_text.headline(found),
        plan_text.doubt(found),
        plan_text.trade_off(found),
        plan_text.compute(found),
        *filter(None, (rental_text.trend(found), rental_text.sizes(found), rental_text.sizes_of_budget(found, budget))),
    ]
    for sentence in [*sentences, plan_text.step_times(found), *found.warnings, *map(_size, found.optimal_sizes)]:
        console.print(f"{sentence[0].upper()}{sentence[1:]}.", highlight=False, markup=False)
    console.print(plan_text.NO_OPTIMUM, highlight=False, markup=False)
    console.print(f"picture: {picture}", highlight=False, markup=False, soft_wrap=True)


def _devices_asked_for(options: argparse.Namespace, record: RunRecord) -> list[str | None]:
    """Return the short names of the devices to plan for; None for the run's own."""
    if options.device is None:
        unused = [name for name in ("precision", "mfu") if getattr(options, name) is not None]
        if unused:
            raise ConfigError(f"--{unused[0]} is for GPUs that the run was not on: add --device")
        own = record.facts.get("device_name")
        wants_price = options.prices is not None or options.within is not None or options.budget is not None
        # Prices are by device, so that a run on a listed one is planned by its name.
        return [device_of(own) if wants_price and isinstance(own, str) else None]
    if options.device.lower() == _ALL_DEVICES:
        listed = DEVICES if options.price_per_gpu_hour else _price_list(options).offers
        return list(listed)
    names = [device_named(text.strip())[0] for text in options.device.split(",")]
    return list(dict.fromkeys(names))


def _price_list(options: argparse.Namespace) -> PriceList:
    if options.prices is None:
        found = shipped_prices()
    elif options.prices == GPUHUNT:
        found = gpuhunt_prices(date=f"{dt.datetime.now(tz=dt.UTC):%Y-%m-%d}")
    else:
        found = prices_of(Path(options.prices))
    name, rate = options.currency or (found.currency, None)
    if name == found.currency:
        return found
    if rate is None:
        raise ConfigError(
            f"the prices are in {found.currency}: say what one {found.currency} is in {name}, such as "
            f"--currency {name}=0.92"
        )
    return found.in_currency(name, rate=rate)


def _prices(options: argparse.Namespace, names: Sequence[str | None]) -> _Priced | None:
    """Return the prices of the devices; None where nothing asks for one."""
    given = options.price_per_gpu_hour
    if given is not None:
        if options.prices is not None:
            raise ConfigError("--price-per-gpu-hour and --prices are two answers to one question: leave one out")
        if len(names) > 1:
            raise ConfigError(f"one price for {len(names)} devices: give a file with --prices, or one --device")
        name, rate = options.currency or ("USD", None)
        if rate is not None:
            raise ConfigError(f"--price-per-gpu-hour is in your currency already: --currency {name}, without a rate")
        return _Priced(
            prices={names[0]: DevicePrice.given(given)},
            currency=_SYMBOLS.get(name, name),
            minimum_rental_s=options.minimum_rental or 0.0,
            source="as given",
        )
    if names == [None]:
        asked = [
            name for name in ("prices", "budget", "currency", "minimum_rental", "within") if getattr(options, name)
        ]
        if asked:
            option = asked[0].replace("_", "-")
            raise ConfigError(
                f"--{option} needs a price, and the run's own device has none: give --device or --price-per-gpu-hour"
            )
        return None
    listed = _price_list(options)
    minimum = listed.minimum_rental_s if options.minimum_rental is None else options.minimum_rental
    return _Priced(
        prices={name: listed.of(name) for name in names if name is not None},
        currency=_SYMBOLS.get(listed.currency, listed.currency),
        minimum_rental_s=minimum,
        source=f"on demand, list of {listed.date}, and prices move",
    )


def _plan(options: argparse.Namespace, record: RunRecord, *, name: str | None, priced: _Priced | None) -> Plan:
    gradient_bytes = _gradient_bytes(record, options.run)
    all_reduce = {"gb_per_s": options.allreduce_gb_per_s, "latency_s": 1e-6 * options.allreduce_latency_us}
    here: Devices | OtherDevices
    if name is None:
        here = devices(record, gradient_bytes=gradient_bytes, **all_reduce)
    else:
        own = device_of(str(record.facts.get("device_name"))) == name
        here = other_devices(
            record,
            devices(record, gradient_bytes=gradient_bytes, **all_reduce) if own else devices(record),
            name=name,
            precision=options.precision and _PRECISIONS[options.precision],
            utilisation=options.mfu,
            gradient_bytes=gradient_bytes,
            **all_reduce,
        )
    prices: dict[str, Any] = {}
    if priced is not None:
        prices = {
            "price": priced.prices[name],
            "currency": priced.currency,
            "minimum_rental_s": priced.minimum_rental_s,
        }
    found = make_plan(
        record, here, numbers=options.gpus, target=options.target, flops_budget=options.flops_budget, **prices
    )
    # The name says which prices were taken, also where the step times are the run's own.
    return found if name is None else replace(found, device=f"{name} GPU")


def _answers(options: argparse.Namespace, plans: Sequence[Plan], *, priced: _Priced | None) -> list[Answer]:
    """Return the answers for those who pay, where a device or one of their questions was asked for."""
    asks = options.device is not None or options.within is not None or options.budget is not None
    if priced is None or not asks:
        return []
    within_s = duration(_WITHIN) if options.within is None else options.within
    budget = _BUDGET if options.budget is None else options.budget
    return rental_text.answers(plans, within_s=within_s, budget=budget, prices=priced.source)


def _comparison(plans: Sequence[Plan]) -> Table:
    table = Table(title="Devices: the cheapest number of each, and the knee")
    heads = ("device", "cheapest", "time", "cost", "knee", "time", "cost")
    for head in heads:
        table.add_column(head, justify="left" if head == "device" else "right")
    for row in rental_text.comparison(plans):
        table.add_row(*row)
    return table


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
    parser.add_argument(
        "--device",
        metavar="LIST",
        help=f"GPUs to plan for, such as H100,L4, or {_ALL_DEVICES} that have a price (default: that of the run)",
    )
    parser.add_argument(
        "--precision", choices=_PRECISIONS, help="of matrix products on --device (default: of the run, or 16 bits)"
    )
    parser.add_argument(
        "--mfu", type=_positive, metavar="SHARE", help="share of the peak that --device reaches (default: see docs)"
    )
    parser.add_argument(
        "--within", type=duration, metavar="TIME", help=f"time limit of the cheapest, such as 90min (default {_WITHIN})"
    )
    parser.add_argument(
        "--budget", type=_positive, metavar="MONEY", help=f"cost limit of the fastest (default {_BUDGET:g})"
    )
    parser.add_argument(
        "--prices", metavar="FILE", help=f"JSON file of prices, or {GPUHUNT} (default: the list that ships, dated)"
    )
    parser.add_argument("--price-per-gpu-hour", type=_positive, metavar="X", help="price per GPU-hour, any currency")
    parser.add_argument(
        "--minimum-rental", type=duration, metavar="TIME", help="shortest time that is billed (default: of the prices)"
    )
    parser.add_argument(
        "--currency", type=_currency, metavar="NAME[=RATE]", help="currency, and what one unit of the prices' is in it"
    )
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


def duration(text: str) -> float:
    """Read a time in seconds: "6h", "90min", "2d", "45s".

    Raises:
        argparse.ArgumentTypeError: where it is none.
    """
    found = _TIME.fullmatch(text.strip())
    if found is None or not float(found[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 6h, 90min, 2d or 45s")
    return float(found[1]) * _TIME_UNITS_S[found[2]]


def _currency(text: str) -> tuple[str, float | None]:
    found = _CURRENCY.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a currency such as EUR, or EUR=0.92")
    return found[1], None if found[2] is None else _positive(found[2])


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _gradient_bytes(record: RunRecord, run_dir: Path) -> float | None:
    """Return the size of a run's gradients; None where nothing tells.

    Where an earlier version did not note it, it is that of the weights in the newest checkpoint, with the frozen ones.
    """
    known = record.facts.get("gradient_bytes")
    if isinstance(known, int | float) and known > 0:
        return float(known)
    newest = max((run_dir / "checkpoints").glob("step-*"), default=None)
    files = [] if newest is None else [newest / "model.safetensors", *newest.glob("model-shard-*.safetensors")]
    return float(sum(path.stat().st_size for path in files)) if files and files[0].exists() else None
