"""What should replicas exchange on a slow network, and are bytes and accuracies as the kinds of exchange say?"""
# python -m benchmarks.exchange [--parts PART,…] [--json PATH|-] [--page PATH.md] [--figure PATH.png] [--quick]
#
# Parts: random_bases, members, local_updates, codistillation, one_model, meter (any machine); bytes, networks (network
# namespaces, so root). A part that is not asked for keeps its rows and figures in the JSON that is there.

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.exchanges import (
    codistillation,
    local_updates,
    members,
    meter_coverage,
    random_bases,
    sent_bytes,
    slow_networks,
)
from benchmarks.hosts.namespaces import reason_to_skip
from benchmarks.result_tables import figures_table, rows_table

Part = tuple[dict[str, float], list[dict[str, Any]]]
"""Figures, and rows."""


def measure_random_bases(*, quick: bool) -> Iterator[Part]:
    """Compare fixed, redrawn and all directions, and 1, 2 and 4 replicas."""
    rows, holds = random_bases.order(
        tasks=("digits",) if quick else ("digits", "mnist1d"),
        sizes=(16,) if quick else random_bases.SIZES,
        seeds=1 if quick else 3,
    )
    on_replicas = random_bases.replicas(num_steps=100)
    falls = all(a["loss"] > b["loss"] for a, b in itertools.pairwise(on_replicas))
    figures = {"random_bases_order_holds": float(holds), "random_bases_more_replicas_lower_loss": float(falls)}
    yield figures, [*rows, *on_replicas]


def measure_meter(*, quick: bool) -> Iterator[Part]:
    """Count how often the meter's interval holds the exact noise scale under each kind."""
    rows = meter_coverage.measure(quick=quick)
    yield meter_coverage.figures(rows), rows


def measure_local_updates(*, quick: bool) -> Iterator[Part]:
    """Compare losses by steps between exchanges, and the spread of replicas with the noise."""
    rows = local_updates.measure(quick=quick)
    yield local_updates.figures(rows), rows


def measure_codistillation(*, quick: bool) -> Iterator[Part]:
    """Compare two replicas with one model, by batch and staleness."""
    rows = codistillation.measure(quick=quick)
    yield codistillation.figures(rows), rows


def measure_one_model(*, quick: bool) -> Iterator[Part]:
    """Search for the rate of the one model that two replicas are compared with."""
    rows = codistillation.measure_rates(quick=quick)
    yield codistillation.figures_of_rates(rows), rows


def measure_bytes(*, quick: bool) -> Iterator[Part]:
    """Compare the bytes of a network device with those that each kind says."""
    reason = reason_to_skip()
    if reason:
        raise SystemExit(f"hosts cannot be made here: {reason}")
    with tempfile.TemporaryDirectory() as name:
        rows = sent_bytes.measure(Path(name), replicas=(2,) if quick else (2, 3))
        yield sent_bytes.figures(rows), rows


def measure_networks(*, quick: bool) -> Iterator[Part]:
    """Search for batches and rates, then time steps on each network; the rows so far after each."""
    reason = reason_to_skip()
    if reason:
        raise SystemExit(f"hosts cannot be made here: {reason}")
    with tempfile.TemporaryDirectory() as name:
        found = slow_networks.search(Path(name), seeds=1 if quick else 3, quick=quick)
        rows: list[dict[str, Any]] = []
        for mbit, delay_s in slow_networks.NETWORKS[:1] if quick else slow_networks.NETWORKS:
            folder = Path(name) / f"{mbit}-{delay_s}"
            folder.mkdir()
            for row in slow_networks.timed(found, folder, mbit=mbit, delay_s=delay_s):
                steps = [one["steps"] for one in found if (one["kind"], one["batch"]) == (row["kind"], row["batch"])]
                rates = [one["rate"] for one in found if (one["kind"], one["batch"]) == (row["kind"], row["batch"])]
                rows.append({**row, "steps": steps[0] if steps else [], "rate": rates[0] if rates else None})
            yield network_figures(rows), rows


def measure_members(*, quick: bool) -> Iterator[Part]:
    """Compare ensembles and codistilled replicas with one model."""
    yield members.compare(num_samples=4_096 if quick else 40_960, seeds=1 if quick else 3)


def network_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the best kind's seconds beside those of the best batch of all-reduce, on each network."""
    figures: dict[str, float] = {}
    for mbit, delay_s in dict.fromkeys((row["mbit"], row["delay_s"]) for row in rows):
        here = [row for row in rows if (row["mbit"], row["delay_s"]) == (mbit, delay_s)]
        exact = best_seconds([row for row in here if row["kind"] == "all_reduce"])
        other = best_seconds([row for row in here if row["kind"] not in ("all_reduce", "ensemble")])
        if exact and other:
            ratio = statistics.median(b / a for a, b in zip(exact, other, strict=True))
            figures[f"best_over_all_reduce_{mbit}_{1000 * delay_s:.0f}"] = ratio
    if "best_over_all_reduce_100_50" in figures:
        figures["slow_best_over_all_reduce"] = figures["best_over_all_reduce_100_50"]
    return figures


def best_seconds(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the seconds to the target, seed by seed, of the row whose median is the lowest."""
    complete = [row for row in rows if row["steps"] and None not in row["steps"]]
    seconds = [[row["step_s"] * whole_rounds(steps, row["every"]) for steps in row["steps"]] for row in complete]
    return min(seconds, key=statistics.median, default=[])


def whole_rounds(steps: int, every: int) -> int:
    """Return the steps up to the next exchange: what was evaluated before it was a mean that nobody had yet."""
    return -(-steps // every) * every


PARTS: Mapping[str, Callable[..., Iterator[Part]]] = {
    "random_bases": measure_random_bases,
    "members": measure_members,
    "local_updates": measure_local_updates,
    "codistillation": measure_codistillation,
    "one_model": measure_one_model,
    "meter": measure_meter,
    "bytes": measure_bytes,
    "networks": measure_networks,
}


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="exchange")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--page", type=Path, help="write the tables of the JSON into a page that has places for them")
    parser.add_argument("--figure", type=Path, help="draw seconds against bandwidth; with --parts none from the JSON")
    options = parser.parse_args()
    figures, rows = _kept(options)
    for part in () if options.parts == "none" else options.parts.split(","):
        for found, measured in PARTS[part](quick=options.quick):
            figures |= found
            rows = [row for row in rows if row["part"] != part] + [{"part": part, **row} for row in measured]
            findings = harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note="rows: see the JSON")
            harness.tell(findings, options, question=__doc__, name="exchange", device="cpu")
    if options.page is not None:
        options.page.write_text(filled(options.page.read_text(encoding="utf-8"), figures, rows), encoding="utf-8")
    if options.figure is not None:
        draw([row for row in rows if row["part"] == "networks"], options.figure)


def filled(page: str, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a page whose tables, each between `<!-- table NAME -->` and `<!-- /table -->`, are those of the JSON."""
    tables = {"figures": figures_table(figures)}
    for name, (part, key, columns) in TABLES.items():
        tables[name] = rows_table([row for row in rows if row["part"] == part and key in row], columns)
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->\n", "<!-- /table -->"
        if begin in page:
            head, rest = page.split(begin)
            page = head + begin + table + end + rest.split(end, maxsplit=1)[1]
    return page


TABLES: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "bytes": (
        "bytes",
        "error",
        {
            "hosts": "{replicas}",
            "kind": "{kind}",
            "computed": "{said:,.0f}",
            "on the wire": "{wire:,.0f}",
            "packets": "{packets:,.0f}",
            "less headers": "{payload:,.0f}",
            "less agreement, off by": "{error:.1%}",
        },
    ),
    "collectives": (
        "bytes",
        "collective",
        {
            "hosts": "{replicas}",
            "collective": "{collective}",
            "computed": "{said:,.0f}",
            "more than that": "{left_over:,.0f}",
        },
    ),
    "meter": (
        "meter",
        "coverage",
        {
            "problem": "{problem}",
            "exchange": "{wrapper}",
            "true φ": "{true_scale:.4g}",
            "φ": "{scale:.4g}",
            "errors of tr(Σ), \\|G\\|²": "{trace_error:.2%}, {grad_error:.2%}",
            "by chance": "{shown_chance}",
            "coverage": "{shown_coverage}",
        },
    ),
    "local_updates": (
        "local_updates",
        "every",
        {
            "replicas": "{replicas}",
            "outer": "{outer}",
            "H": "{every}",
            "rate": "{rate}",
            "cross-entropy": "{loss:.3f}",
            "accuracy": "{accuracy:.1%}",
            "spread over formula": "{spread_over_formula:.2f}",
        },
    ),
    "codistillation": (
        "codistillation",
        "arm",
        {"batch": "{batch}", "arm": "{arm}", "cross-entropy": "{loss:.3f}", "accuracy": "{accuracy:.1%}"},
    ),
    "one_model": (
        "one_model",
        "arm",
        {"batch": "{batch}", "arm": "{arm}", "cross-entropy": "{loss:.3f}", "accuracy": "{accuracy:.1%}"},
    ),
}
"""Name of a table on the page → part, the column that its rows have, and heads with templates of cells."""


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the seconds of each kind's best batch against the bandwidth, a panel for each delay."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    delays = sorted({row["delay_s"] for row in rows})
    figure = Figure(figsize=(4.5 * len(delays), 4), layout="constrained")
    for place, delay_s in enumerate(delays, 1):
        axes = figure.add_subplot(1, len(delays), place)
        for kind in dict.fromkeys(row["kind"] for row in rows if row["steps"]):
            own = [row for row in rows if row["kind"] == kind and row["delay_s"] == delay_s]
            found = {mbit: best_seconds([row for row in own if row["mbit"] == mbit]) for mbit in _bandwidths(own)}
            known = {mbit: statistics.median(seconds) for mbit, seconds in found.items() if seconds}
            axes.plot(list(known), list(known.values()), marker="o", label=kind)
        axes.set(xscale="log", yscale="log", xlabel="bandwidth in Mbit/s", ylabel="seconds to the target")
        axes.set_title(f"{1000 * delay_s:g} ms one way")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xticks(_bandwidths(rows))
        axes.set_yticks([1, 2, 5, 10, 20, 50])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=100)


def _bandwidths(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return sorted({row["mbit"] for row in rows})


_COLUMNS = {"part": "{part}"}


def _kept(options: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    if options.json in (None, "-") or not Path(options.json).exists():
        return {}, []
    before = json.loads(Path(options.json).read_text(encoding="utf-8"))
    return before["figures"], before["rows"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
