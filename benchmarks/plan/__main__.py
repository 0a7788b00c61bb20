"""Does a plan from the first fifth of a run hold: are the samples to a loss, measured later, inside its interval?"""
# python -m benchmarks.plan [--task pysource|digits] [--keep FOLDER] [--page FOLDER] [--json PATH|-] [--quick]

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import harness
from benchmarks.plan.timed_runs import Took, took, train
from dptrain.batch import BatchPlan
from dptrain.errors import ConfigError
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.planner import Planner, Point
from dptrain.explain.model.progress import loss_curve
from dptrain.explain.record import SAMPLES, RunRecord, read_run
from dptrain.tasks import resolve_task

LEAST_INSIDE = 0.8
"""Of the targets, whose measured samples must lie inside the interval."""
NUM_DEFAULT_TARGETS = 10
_PART = 5
"""The run that is planned from sees one in so many of the samples."""
_PATIENCE = 3
"""Times the samples that a run needs about, after which a setting is given up."""
_REPLICAS = 2
_ERRORS = ("plan_median_error", "samples_median_error", "seconds_median_error", "step_time_median_error")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and where it is to come to.

    Attributes:
        task: name of the task.
        num_samples: about what a run needs to the last target.
        targets: held-out losses, falling, chosen before anything was planned.
        settings: (global batch, replicas) that are predicted and then run.
    """

    task: str
    num_samples: int
    targets: Sequence[float]
    settings: Sequence[tuple[int, int]] = ((16, 1), (32, 2), (64, 1), (128, 2))


CASES = {
    "pysource": Case(task="pysource", num_samples=40_000, targets=(1.6, 1.52, 1.45)),
    "digits": Case(task="digits", num_samples=10_000, targets=(0.25, 0.2, 0.15)),
}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What was trained for a case.

    Attributes:
        begun: the first part of a run with a constant learning rate, which is planned from.
        whole: a run with all defaults, whose learning rate falls; its first part is planned from too.
        settled: by setting, the run of each fixed batch.
    """

    begun: RunRecord
    whole: RunRecord
    settled: dict[tuple[int, int], RunRecord]


def measure(quick: bool, *, task: str, keep: Path | None = None) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Run the beginning and the whole, plan, then run every setting.

    Args:
        quick: digits in any case.
        task: what is trained.
        keep: a folder for the runs; those that it holds already are read and not trained again.
    """
    case = CASES["digits" if quick else task]
    with _folder(keep) as folder:
        runs = _trained(case, folder)
    return findings(case=case, runs=runs)


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _trained(case: Case, folder: Path) -> Runs:
    console = Console(stderr=True)

    def run(name: str, **options: Any) -> RunRecord:  # noqa: ANN401 - those of train
        if _is_done(folder / name, target=options.get("target")):
            return read_run(folder / name)
        with console.status(name):
            return train(folder / name, **options)

    begun = run("begun", replicas=_REPLICAS, settings=_begun(case))
    whole = run("whole", replicas=_REPLICAS, settings={"task": case.task})
    last = case.targets[-1]
    settled = {}
    for batch, replicas in case.settings:
        shape = _layout(case, begun, batch=batch, replicas=replicas)
        settled[batch, replicas] = run(
            f"{batch}-{replicas}", replicas=replicas, settings=_fixed(case, shape), target=last
        )
    return Runs(begun=begun, whole=whole, settled=settled)


def _median_error(rows: Sequence[dict[str, Any]], *names: str) -> float:
    """Return the median of |planned/measured − 1|; 0 where nothing was planned."""
    errors = [abs(row[f"{name}_ratio"] - 1) for row in rows for name in names]
    return statistics.median(errors) if errors else 0.0


def _is_done(folder: Path, *, target: float | None) -> bool:
    """Return whether a kept run ended by itself, or came to its target, where it was asked to end."""
    if not (folder / "metrics.jsonl").exists():
        return False
    return (folder / "summary.json").exists() or (target is not None and took(read_run(folder), target=target).reached)


def findings(*, case: Case, runs: Runs) -> harness.Findings:
    """Read the answer from the runs."""
    begun = runs.begun
    rows = []
    refused = 0
    for target in case.targets:
        try:
            planner = Planner(begun, devices(begun), target=target)
        except ConfigError as error:
            if "too far beyond" not in str(error):
                raise
            refused += len(runs.settled)
            continue
        for (batch, replicas), record in runs.settled.items():
            point = planner.at(_layout(case, begun, batch=batch, replicas=replicas))
            rows.append(_row(point, took(record, target=target), target=target))
    samples, seconds, steps = (_median_error(rows, name) for name in ("samples", "seconds", "step_s"))
    both = _median_error(rows, "samples", "seconds")
    by_default = default_targets(runs.whole)
    near = Planner(begun, devices(begun))
    planned = [row["target"] for row in rows]
    far = Planner(begun, devices(begun), target=min(planned)) if planned else near
    figures = {
        **dict(zip(_ERRORS, (both, samples, seconds, steps), strict=True)),
        "samples_inside": sum(row["samples_inside"] for row in rows),
        "seconds_inside": sum(row["seconds_inside"] for row in rows),
        "num_predictions": len(rows),
        "num_refused": refused,
        "num_given_up": sum(not row["reached"] for row in rows),
        "default_targets": len(by_default),
        "default_refused": sum(found == "refused" for found in by_default),
        "default_inside": sum(found == "inside" for found in by_default),
        "lowest_begun": near.curve.lowest,
        "further": far.needed.implied.min_steps / near.needed.implied.min_steps,
    }
    note = (
        f"default schedule: {'held' if default_holds(figures) else 'BROKEN'}; constant rate, {LEAST_INSIDE:.0%} "
        f"inside: {'held' if constant_holds(figures) else 'BROKEN'}; seconds are those of this machine"
    )
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=note)


def default_holds(figures: Any) -> bool:  # noqa: ANN401 - a mapping of numbers
    """Return whether no plan from the default run's beginning misleads: refused, or inside often enough."""
    planned = figures["default_targets"] - figures["default_refused"]
    return bool(figures["default_inside"] >= LEAST_INSIDE * planned)


def constant_holds(figures: Any) -> bool:  # noqa: ANN401 - the same
    """Return whether the samples of runs at a constant rate lie inside the interval often enough."""
    return bool(figures["samples_inside"] >= LEAST_INSIDE * figures["num_predictions"]) and not figures["num_given_up"]


def default_targets(whole: RunRecord) -> list[str]:
    """Plan from the first part of a default run to losses of the rest: refused, inside the interval, or outside.

    The loss is the one that the part is planned by. The samples are those of the run itself, whose batch moved; they
    are held against those planned at its mean batch up to there. A refusal counts only where it names the learning
    rate.
    """
    end = float(whole.train[-1][SAMPLES])
    part = first_part(whole, samples=end / _PART)
    by_training = loss_curve(part).name != loss_curve(whole).name
    curve = loss_curve(replace(whole, evals=[]) if by_training else whole)
    lowest = np.minimum.accumulate(curve.losses)
    found = []
    for at in np.linspace(end / _PART * 1.25, end, NUM_DEFAULT_TARGETS):
        target = float(np.interp(at, curve.samples, lowest))
        try:
            planner = Planner(part, devices(part), target=target)
        except ConfigError as error:
            if "learning rate falls" not in str(error):
                raise
            found.append("refused")
            continue
        steps = np.interp(at, [row[SAMPLES] for row in whole.train], [row["step"] for row in whole.train])
        micro = int(part.train[-1]["batch/micro"])
        passes = max(1, round(at / steps / (micro * _REPLICAS)))
        shape = BatchPlan(micro_batch_size=micro, accumulation_steps=passes, world_size=_REPLICAS)
        low, high = planner.at(shape).samples_range
        found.append("inside" if low <= at <= high else "outside")
    return found


def first_part(record: RunRecord, *, samples: float) -> RunRecord:
    """Return a run as it was after so many samples."""
    rows, evals = ([row for row in part if row[SAMPLES] <= samples] for part in (record.train, record.evals))
    summary = {name: value for name, value in record.summary.items() if name in ("task", "device", "world_size")}
    return replace(record, train=rows, evals=evals, summary=summary)


_COLUMNS = {
    "target": "{target:g}",
    "batch": "{batch:,.0f}",
    "replicas": "{replicas:,.0f}",
    "samples: planned": "{samples_planned:,.0f}",
    "range": "{samples_range}",
    "measured": "{samples_measured:,.0f}",
    "inside": "{samples_inside}",
    "seconds: planned": "{seconds_planned:,.1f}",
    "range ": "{seconds_range}",
    "measured ": "{seconds_measured:,.1f}",
    "inside ": "{seconds_inside}",
    "step: planned": "{step_s_planned:.3g}",
    "measured  ": "{step_s_measured:.3g}",
}


def _row(point: Point, found: Took, *, target: float) -> dict[str, Any]:
    pairs = {
        "samples": (point.samples, found.samples),
        "seconds": (point.seconds, found.seconds),
        "step_s": (point.step_s, found.step_s),
    }
    ranges = {"samples": point.samples_range, "seconds": point.seconds_range}
    return {
        "target": target,
        "batch": point.global_batch_size,
        "replicas": point.num_devices,
        **{f"{name}_planned": planned for name, (planned, _) in pairs.items()},
        **{f"{name}_measured": measured for name, (_, measured) in pairs.items()},
        **{f"{name}_ratio": planned / measured for name, (planned, measured) in pairs.items()},
        "samples_range": " to ".join(f"{end:,.0f}" for end in point.samples_range),
        "seconds_range": " to ".join(f"{end:,.1f}" for end in point.seconds_range),
        **{f"{name}_inside": int(low <= pairs[name][1] <= high) for name, (low, high) in ranges.items()},
        "reached": int(found.reached),
    }


def _begun(case: Case) -> dict[str, str]:
    """Return the settings of the run to plan from: all defaults, for the first part of a run with a constant rate."""
    suggestion = resolve_task(case.task).suggestion
    largest = max(suggestion.global_batch_size, min(64 * suggestion.global_batch_size, case.num_samples // 50))
    return {
        **_common(case),
        "max_samples": str(case.num_samples // _PART),
        "control.largest": str(largest),
        "log.eval_every_samples": str(case.num_samples // (20 * _PART)),
    }


def _fixed(case: Case, shape: BatchPlan) -> dict[str, str]:
    """Return the settings of a run of one batch: the rate by the default's rule, the root of the batch."""
    suggestion = resolve_task(case.task).suggestion
    rate = suggestion.learning_rate * math.sqrt(shape.global_batch_size / suggestion.global_batch_size)
    return {
        **_common(case),
        "control.law": "constant",
        "global_batch_size": str(shape.global_batch_size),
        "micro_batch_size": str(shape.micro_batch_size),
        "optimizer.learning_rate": f"{rate:.6g}",
        "max_samples": str(_PATIENCE * case.num_samples),
    }


def _common(case: Case) -> dict[str, str]:
    # Constant: the end of a schedule that falls would be another one at each setting.
    return {
        "task": case.task,
        "optimizer.schedule": "constant",
        "optimizer.warmup_samples": str(case.num_samples // 50),
        "log.eval_every_samples": str(case.num_samples // 40),
    }


def _layout(case: Case, begun: RunRecord, *, batch: int, replicas: int) -> BatchPlan:
    """Return how a batch is cut: into the micro-batches of the run, at least two in a step."""
    largest = int(max(row["batch/micro"] for row in begun.train))
    micro = min(largest, batch // 2, batch // replicas)
    assert batch % (micro * replicas) == 0, f"{case.task}: {batch} cannot be cut into {micro} on {replicas}"
    return BatchPlan(micro_batch_size=micro, accumulation_steps=batch // (micro * replicas), world_size=replicas)


def page(found: harness.Findings, *, case: Case) -> str:
    """Write the findings as a page."""
    figures = found.figures
    error, samples, seconds, steps = (f"{figures[name]:.0%}" for name in _ERRORS)
    planned = figures["default_targets"] - figures["default_refused"]
    verdict = "Refused" if not planned else "Yes" if default_holds(figures) else "**No**"
    by_default = (
        f"{verdict} for the default schedule, whose learning rate falls: of {figures['default_targets']:.0f} targets "
        f"beyond the first fifth, {figures['default_refused']:.0f} were refused with the reason, "
        f"{figures['default_inside']:.0f} were inside, and {planned - figures['default_inside']:.0f} outside."
    )
    constant = (
        f"{'Yes' if constant_holds(figures) else '**No**'} for a constant rate: the samples lay inside the interval "
        f"in {figures['samples_inside']:.0f} of {figures['num_predictions']:.0f} predictions (the goal is "
        f"{LEAST_INSIDE:.0%}), the seconds in {figures['seconds_inside']:.0f}. The median error is {error}: {samples} "
        f"in samples, {seconds} in seconds, {steps} in the time of a step. {figures['num_refused']:.0f} further "
        f"predictions were refused as too far; {figures['num_given_up']:.0f} runs did not come to their target."
    )
    paragraphs = [
        f"# {str(__doc__).strip()}",
        f"    python -m benchmarks.plan --task {case.task} --page benchmarks/results",
        by_default,
        constant,
        _lines("| figure | value |", "|---|---|", *(f"| `{name}` | {value:.4g} |" for name, value in figures.items())),
        "## Planned and measured at a constant rate",
        _table(found),
        _RUN.format(
            **harness.environment(device="CPU"),
            task=case.task,
            targets=", ".join(f"{target:g}" for target in case.targets),
            begun=case.num_samples // _PART,
            lowest=figures["lowest_begun"],
            further=figures["further"],
            replicas=_REPLICAS,
        ),
        _NOT_SHOWN,
    ]
    return "\n\n".join(paragraphs) + "\n"


def _table(found: harness.Findings) -> str:
    heads = " | ".join(head.strip() for head in found.columns)
    rows = (" | ".join(cell.format_map(row) for cell in found.columns.values()) for row in found.rows)
    return _lines(f"| {heads} |", "|" + "---|" * len(found.columns), *(f"| {row} |" for row in rows))


def _lines(*lines: str) -> str:
    return "\n".join(lines)


_RUN = """## What was run

dptrain {dptrain} on torch {torch} and Python {python}, {cpu_count} CPUs ({processor}), one thread for each replica.
The run that is planned from is `dptrain train --task {task}` with all its defaults, on {replicas} replicas, but for a
learning rate that stays constant after its warm-up. It saw {begun:,} samples and came to a held-out loss of
{lowest:.4g}; the targets are {targets}, the last of which lies {further:.2g} times as far, in steps without noise. Each
setting is then trained from the start at its fixed batch, with the default's learning rate times the root of the
batch's ratio, until its held-out loss is at the last target. Samples are read off straight lines between evaluations;
seconds are those of optimizer steps, without evaluations and saves. The *range* of samples is by the noise scale's
interval and the extrapolation; that of seconds also by what the all-reduce may be, and the error of the step times.

For the default schedule, `dptrain train --task {task}` is trained to its end, cut after a fifth, and planned from there
to losses that it came to later."""

_NOT_SHOWN = """## What the numbers do not show

- **Other machines.** Seconds are those of one machine and of two replicas at most. Kept runs may have been trained
  side by side, and beside other work, as those of this page were: their seconds say little, their losses do not change.
- **A fresh test of the interval.** Its parts were settled with these runs in view: before it held the critical ratio's
  spread, batches of 32 and 128 lay outside. `--task digits` refuses all its targets, 25 times as far, as too far.
- **Independent targets.** Those of one setting are points of one run, and all predictions are from one beginning.
- **A learning rate of each batch's own.** Searched for at each batch, it would give another frontier than the rule."""


def main() -> None:
    """Measure, tell, and write the page where asked to."""
    parser = harness.command_line(question=__doc__, name="plan")
    parser.add_argument("--task", choices=CASES, default="pysource", help="what is trained (%(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs there, and read those it holds")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write plan.md and plan.json there")
    options = parser.parse_args()
    if options.page is not None and options.json is None:
        options.json = str(options.page / "plan.json")
    found = measure(options.quick, task=options.task, keep=options.keep)
    harness.tell(found, options, question=__doc__, name="plan", device="CPU")
    if options.page is not None:
        case = CASES["digits" if options.quick else options.task]
        (options.page / "plan.md").write_text(page(found, case=case), encoding="utf-8")


if __name__ == "__main__":
    main()
