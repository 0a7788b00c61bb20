"""At equal samples under a falling rate, do adaptive runs end where fixed batches of their speed do?"""
# python -m benchmarks.loss_at_equal_samples --task digits|pysource [--seeds N] [--results FOLDER] [--json PATH|-]

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.result_tables import figures_table
from benchmarks.targets.benchmark_case import BenchmarkCase, Run, Search, benchmark_cases, search_rate
from benchmarks.targets.page import ABOUT_TASKS, joined, table
from benchmarks.targets.timed_run import Finish, Mark, Pair, TimedRun

_SAMPLES = {"pysource": 40_000, "digits": 300_000}
"""Length of all runs, about what a middling batch takes to the target of `time_to_target`."""
_BATCHES = {"pysource": [2**k for k in range(4, 10)], "digits": [2**k for k in range(6, 12)]}
_STARTS = {"": 1, ", from four times as large": 4}
"""Where adaptive runs begin: at the task's default batch, or at a multiple of it."""
_QUICK = 0.02


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The runs of a variant at its best rate.

    Attributes:
        learning_rate: of a fixed batch at that, of an adaptive run at the task's default batch.
        at_edge: whether no larger, or no smaller, rate was tried.
        ends: by seed; without those of runs that diverged.
        batches: the last one of each run, of those that diverged too.
    """

    learning_rate: float
    at_edge: bool
    ends: Mapping[int, Mark]
    batches: Sequence[int]

    @property
    def loss(self) -> float:
        """The median held-out loss at the end, in which a run that diverged is infinitely bad."""
        return statistics.median([end.loss for end in self.ends.values()] + [math.inf] * self.num_diverged)

    @property
    def seconds(self) -> float:
        """The median seconds of training, of the runs that did not diverge."""
        return statistics.median(end.seconds for end in self.ends.values())

    @property
    def num_diverged(self) -> int:
        """Runs without an end."""
        return len(self.batches) - len(self.ends)


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="loss_at_equal_samples")
    parser.add_argument("--task", choices=sorted(_SAMPLES), required=True, help="what is trained")
    parser.add_argument(
        "--seeds", type=int, default=None, help="of each variant, beside three of its search (8; quick 1)"
    )
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="write page, JSON and picture there")
    options = parser.parse_args()
    if options.results is not None and not options.results.is_dir():
        parser.error(f"{options.results} is not a folder that exists")
    num_seeds = options.seeds or (1 if options.quick else 8)
    samples = round(_SAMPLES[options.task] * (_QUICK if options.quick else 1))
    variants = measure(options.task, samples=samples, quick=options.quick, num_seeds=num_seeds)
    found = findings(variants, samples=samples)
    name = f"loss_at_equal_samples --task {options.task}" + (f" --seeds {options.seeds}" if options.seeds else "")
    if options.results is not None:
        path = options.results / f"equal_samples_{options.task}"
        draw(variants, title=f"{options.task}: {samples:,} samples on two replicas", path=path.with_suffix(".png"))
        path.with_suffix(".md").write_text(
            page(found, task=options.task, samples=samples, num_seeds=num_seeds), encoding="utf-8"
        )
        options.json = options.json or str(path.with_suffix(".json"))
    harness.tell(found, options, question=__doc__, name=name, device="cpu")


def measure(task: str, *, samples: int, quick: bool, num_seeds: int) -> Mapping[str, Ended]:
    """Search the rate of each variant by the loss at the end, then run all variants with further seeds, in turns."""
    case = benchmark_cases(quick=False)[task]
    case = dataclasses.replace(case, optimizer={**case.optimizer, "schedule": "cosine"})
    batches = _BATCHES[task][2:3] if quick else _BATCHES[task]
    variants: dict[str, int | None] = {f"fixed {batch}": batch for batch in batches}
    variants |= {f"adaptive{where}": None for where in list(_STARTS)[: 1 if quick else None]}

    def timed_run(name: str, rate: float, _most_steps: float, seed: int) -> TimedRun:
        batch = variants[name]
        return _timed_run(case, samples=samples, name=name, batch=batch, learning_rate=rate, seed=seed)

    with Pair() as pair:
        run = _to_the_end(pair.run)
        run(timed_run(next(iter(variants)), case.guess(batches[0]), math.inf, 0))  # the first run of a process is slow
        searches: dict[str, Search] = {}
        for name, batch in variants.items():
            start = case.guess(batch or case.default_batch)
            searches[name] = search_rate(partial(timed_run, name), start=start, run=run, cost=lambda end: end.loss)
            print(f"{name}: rate {searches[name].rate:.3g}", file=sys.stderr, flush=True)
        finishes: dict[str, dict[int, Finish]] = {name: {} for name in variants}
        for seed in range(1, num_seeds + 1):
            for place in range(len(variants)):
                name = list(variants)[(place + seed) % len(variants)]
                finishes[name][seed] = run(timed_run(name, searches[name].rate, math.inf, seed))
    return {name: _ended(searches[name], found) for name, found in finishes.items()}


def _timed_run(case: BenchmarkCase, *, samples: int, name: str, batch: int | None, **more: Any) -> TimedRun:  # noqa: ANN401 - handed on
    if batch is not None:
        timed_run = case.fixed(batch, **more)
    else:
        start = case.default_batch * _STARTS[name.removeprefix("adaptive")]
        timed_run = case.timed_run(batch=start, control={}, reference_batch=case.default_batch, **more)
    # The target is never reached, and nothing is evaluated but the end.
    settings = {**timed_run.settings, "max_samples": samples, "log": {"eval_every_samples": samples}}
    return dataclasses.replace(timed_run, settings=settings, target=1e-9, most_steps=math.inf)


def _to_the_end(run: Run) -> Run:
    """Return `run`, for which a timed run ends where its samples do, unless it diverged."""

    def running(timed_run: TimedRun) -> Finish:
        finish = run(timed_run)
        return finish if finish.reason else dataclasses.replace(finish, end=finish.marks[-1])

    return running


def _ended(search: Search, finishes: Mapping[int, Finish]) -> Ended:
    return Ended(
        learning_rate=search.rate,
        at_edge=search.rate in (min(search.finishes), max(search.finishes)),
        ends={seed: finish.end for seed, finish in finishes.items() if finish.end is not None},
        batches=[max(row["batch/global"] for row in finish.rows[-2:]) for finish in finishes.values()],
    )


def findings(variants: Mapping[str, Ended], *, samples: int) -> harness.Findings:
    """Compare adaptive variants with fixed ones of their speed.

    Args:
        variants: fixed ones by their batches, then the adaptive ones.
        samples: of each run.
    """
    fixed = {name: variant for name, variant in variants.items() if name.startswith("fixed")}
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, variant in variants.items():
        losses = [end.loss for end in variant.ends.values()]
        row: dict[str, Any] = {
            "variant": name,
            "learning_rate": variant.learning_rate,
            "at_edge": variant.at_edge,
            "losses": losses,
            "seconds": [end.seconds for end in variant.ends.values()],
            "last_batches": list(variant.batches),
            "shown_rate": f"{variant.learning_rate:.3g}" + (" (edge of the grid)" if variant.at_edge else ""),
            "shown_loss": _shown(losses) + (f", {variant.num_diverged} diverged" if variant.num_diverged else ""),
            "shown_seconds": _shown([end.seconds for end in variant.ends.values()]),
            "shown_batch": _shown(variant.batches),
            "shown_gap": "",
            "shown_ratio": "",
        }
        if name not in fixed:
            gap, spread = variant.loss - loss_at_speed(fixed.values(), variant.seconds), _spread(fixed.values())
            ratio = variant.seconds / seconds_at_loss(fixed.values(), variant.loss)
            row |= {"shown_gap": f"{gap:+.3g}", "shown_ratio": f"{ratio:.2f}"}
            label = name.replace(", ", "_").replace(" ", "_")
            figures |= {f"loss_gap_{label}": gap, f"seconds_ratio_{label}": ratio, "loss_spread": spread}
        rows.append(row)
    return harness.Findings(
        figures=figures,
        rows=rows,
        columns={
            "variant": "{variant}",
            "rate": "{shown_rate}",
            "held-out loss": "{shown_loss}",
            "seconds": "{shown_seconds}",
            "last batch": "{shown_batch}",
            "loss above fixed batches of its speed": "{shown_gap}",
            "seconds to fixed batches of its loss": "{shown_ratio}",
        },
        note=f"All runs see {samples:,} samples under a cosine; medians (least–most) of "
        f"{max(len(variant.ends) for variant in variants.values())} seeds.",
    )


def loss_at_speed(fixed: Collection[Ended], seconds: float) -> float:
    """Return the least loss that a fixed batch ends at in so many seconds, between two by the logarithm of seconds.

    A batch that another beats in both is left out; faster than the fastest, or slower than the slowest, counts as it.
    """
    best = frontier(fixed)
    logarithms, losses = [math.log(variant.seconds) for variant in best], [variant.loss for variant in best]
    return float(np.interp(math.log(seconds), logarithms, losses))


def seconds_at_loss(fixed: Collection[Ended], loss: float) -> float:
    """Return the least seconds in which a fixed batch ends at a loss, by the same line; the slowest's below all."""
    best = frontier(fixed)[::-1]
    logarithms, losses = [math.log(variant.seconds) for variant in best], [variant.loss for variant in best]
    return math.exp(float(np.interp(loss, losses, logarithms)))


def frontier(fixed: Collection[Ended]) -> list[Ended]:
    """Return the fixed batches that no other one beats in both loss and seconds, the fastest first."""
    best: list[Ended] = []
    for variant in sorted(fixed, key=lambda variant: variant.seconds):
        if not best or variant.loss < best[-1].loss:
            best.append(variant)
    return best


def _spread(fixed: Collection[Ended]) -> float:
    """Return the standard deviation over seeds of a fixed batch's loss, the median over batches."""
    found = [statistics.stdev(end.loss for end in variant.ends.values()) for variant in fixed if len(variant.ends) > 1]
    return statistics.median(found) if found else 0.0


def _shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.4g} ({min(values):,.4g}–{max(values):,.4g})" if values else "none arrived"


def draw(variants: Mapping[str, Ended], *, title: str, path: Path) -> None:
    """Draw the loss at the end against the seconds, medians with their range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    fixed = {name: variant for name, variant in variants.items() if name.startswith("fixed")}
    best = frontier(fixed.values())
    axes.plot([variant.seconds for variant in best], [variant.loss for variant in best], color="#999999", linewidth=1.2)
    for name, variant in variants.items():
        is_fixed = name in fixed
        seconds, losses = ([getattr(end, what) for end in variant.ends.values()] for what in ("seconds", "loss"))
        axes.errorbar(
            variant.seconds, variant.loss,
            xerr=[[variant.seconds - min(seconds)], [max(seconds) - variant.seconds]],
            yerr=[[variant.loss - min(losses)], [max(losses) - variant.loss]],
            fmt="o" if is_fixed else "*" if name == "adaptive" else "v", color="#444444" if is_fixed else "#d55e00",
            markersize=9, elinewidth=0.8, label=None if is_fixed else name,
        )  # fmt: skip
        if is_fixed:
            batch = name.removeprefix("fixed ")
            axes.annotate(batch, (variant.seconds, variant.loss), textcoords="offset points", xytext=(7, 5), fontsize=9)
    axes.set(xscale="log", xlabel="seconds of training", ylabel="held-out loss at the end", title=title)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def verdict(figures: Mapping[str, float]) -> str:
    """Say of each adaptive variant whether it ends where fixed batches of its speed do."""
    spread, said = figures["loss_spread"], []
    for figure, gap in figures.items():
        if figure.startswith("loss_gap_"):
            name = figure.removeprefix("loss_gap_").replace("_", " ")
            where = "as low as" if abs(gap) <= spread else "lower than" if gap < 0 else "HIGHER than"
            ratio = figures[f"seconds_ratio_{figure.removeprefix('loss_gap_')}"]
            said.append(
                f"{name} ends {where} fixed batches of its speed ({gap:+.3g}, seeds spread by {spread:.2g}), "
                f"in {ratio:.2f} of the seconds of fixed batches of its loss"
            )
    return "; ".join(said)


def page(found: harness.Findings, *, task: str, samples: int, num_seeds: int) -> str:
    """Return the page of a task."""
    rows = [[cell.format_map(row) for cell in found.columns.values()] for row in found.rows]
    return joined(
        f"# {__doc__}",
        f"    python -m benchmarks.loss_at_equal_samples --task {task} --results benchmarks/results",
        f"On `{task}`: {verdict(found.figures)}.",
        figures_table(found.figures).rstrip(),
        _RUNS.format(
            **harness.environment(device="cpu"),
            task=task,
            options=ABOUT_TASKS[task],
            samples=samples,
            num_seeds=num_seeds,
        ),
        table(list(found.columns), rows),
        f"![Loss against seconds](equal_samples_{task}.png)",
        _NOT_SHOWN,
    )


_RUNS = """\
dptrain {dptrain} on torch {torch} and Python {python}: two gloo replicas of one thread each on {cpu_count} cores of
{processor}. Task `{task}` ({options}), {samples:,} samples, at a rate that falls along a cosine to a tenth. The
adaptive runs are dptrain's default in all but task, rate and first batch, the fixed ones plain runs in which nothing is
measured. The rate of each variant is the best of at least four on a grid of factors of two, by the loss at the end,
widened until it has a worse one on both sides, and among it and its neighbours the one that is best in the worst of
three seeds; that of adaptive runs is for the task's default batch, wherever they begin. Then all variants are run with
{num_seeds} further seeds, in turns. Cells are medians with the least and the most. The last two columns compare with
the line through those fixed batches that no other one beats in both loss and seconds, straight in the logarithm of the
seconds; beyond the fastest and the slowest it stays level."""
_NOT_SHOWN = """\
What the numbers do not show: GPUs; other lengths; another warm-up, which is the same in samples for all and so has
fewer steps in large batches. A fixed batch of a given speed has to be found, too, with its rate."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
