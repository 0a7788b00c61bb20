"""Does a plan from the first fifth of a run predict samples and seconds to a loss at other batches and replicas?"""
# python -m benchmarks.plan [--task pysource|digits] [--page FOLDER] [--json PATH|-] [--quick]

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import harness
from benchmarks.timed_runs import Took, took, train
from dptrain.control import StepShape
from dptrain.explain.model.devices import devices
from dptrain.explain.model.planner import Planner, Point
from dptrain.explain.record import RunRecord
from dptrain.tasks import resolve_task

LARGEST_ERROR = 0.3
_PART = 5
"""The run that is planned from sees one in so many of the samples."""
_PATIENCE = 3
"""Times the predicted samples after which a setting is given up."""
_REPLICAS = 2
_ERRORS = ("plan_median_error", "samples_median_error", "seconds_median_error", "step_time_median_error")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and where it is to come to.

    Attributes:
        task: name of the task.
        num_samples: about what a run needs to the target.
        target: held-out loss, chosen before anything was planned.
        settings: (global batch, replicas) that are predicted and then run.
    """

    task: str
    num_samples: int
    target: float
    settings: Sequence[tuple[int, int]] = ((16, 1), (32, 2), (64, 1), (128, 2))


CASES = {
    "pysource": Case(task="pysource", num_samples=40_000, target=1.45),
    "digits": Case(task="digits", num_samples=10_000, target=0.15),
}


def measure(quick: bool, *, task: str) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Run the beginning, plan from it, then run every setting."""
    case = CASES["digits" if quick else task]
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, console.status("the run to plan from"):
        begun = train(Path(folder) / "begun", replicas=_REPLICAS, settings=_begun(case))
        planner = Planner(begun, devices(begun), target=case.target)
        for batch, replicas in case.settings:
            point = planner.at(_layout(case, begun, batch=batch, replicas=replicas))
            console.print(f"batch {batch} on {replicas}: predicted {point.samples:,.0f} samples, {point.seconds:.0f} s")
            settings = _fixed(case, point)
            record = train(
                Path(folder) / f"{batch}-{replicas}", replicas=replicas, settings=settings, target=case.target
            )
            rows.append(_row(point, took(record, target=case.target)))
    return findings(rows, case=case, begun=begun)


def findings(rows: list[dict[str, Any]], *, case: Case, begun: RunRecord) -> harness.Findings:
    """Read the answer from the rows."""
    planner = Planner(begun, devices(begun), target=case.target)
    samples, seconds, steps = (
        statistics.median(abs(row[f"{name}_ratio"] - 1) for row in rows) for name in ("samples", "seconds", "step_s")
    )
    both = statistics.median(abs(row[f"{name}_ratio"] - 1) for row in rows for name in ("samples", "seconds"))
    figures = {
        **dict(zip(_ERRORS, (both, samples, seconds, steps), strict=True)),
        "num_settings": len(rows),
        "num_given_up": sum(not row["reached"] for row in rows),
        "lowest_begun": planner.curve.lowest,
        "target": case.target,
        "further": planner.needed.implied.min_steps / Planner(begun, devices(begun)).needed.implied.min_steps,
    }
    within = figures["plan_median_error"] <= LARGEST_ERROR and not figures["num_given_up"]
    note = (
        f"median error up to {LARGEST_ERROR:.0%}: {'held' if within else 'BROKEN'}; seconds are those of this machine"
    )
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=note)


_COLUMNS = {
    "batch": "{batch:,.0f}",
    "replicas": "{replicas:,.0f}",
    "samples: planned": "{samples_planned:,.0f}",
    "measured": "{samples_measured:,.0f}",
    "ratio": "{samples_ratio:.2f}",
    "seconds: planned": "{seconds_planned:,.1f}",
    "range": "{seconds_range}",
    "measured ": "{seconds_measured:,.1f}",
    "ratio ": "{seconds_ratio:.2f}",
    "step: planned": "{step_s_planned:.3g}",
    "measured  ": "{step_s_measured:.3g}",
}


def _row(point: Point, found: Took) -> dict[str, Any]:
    pairs = {
        "samples": (point.samples, found.samples),
        "seconds": (point.seconds, found.seconds),
        "step_s": (point.step_s, found.step_s),
    }
    return {
        "batch": point.global_batch_size,
        "replicas": point.num_devices,
        **{f"{name}_planned": planned for name, (planned, _) in pairs.items()},
        **{f"{name}_measured": measured for name, (_, measured) in pairs.items()},
        **{f"{name}_ratio": planned / measured for name, (planned, measured) in pairs.items()},
        "seconds_range": " to ".join(f"{end:,.1f}" for end in point.seconds_range),
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


def _fixed(case: Case, point: Point) -> dict[str, str]:
    """Return the settings of a run of one batch: the rate by the default's rule, the root of the batch."""
    suggestion = resolve_task(case.task).suggestion
    rate = suggestion.learning_rate * math.sqrt(point.global_batch_size / suggestion.global_batch_size)
    return {
        **_common(case),
        "control.law": "constant",
        "global_batch_size": str(point.global_batch_size),
        "micro_batch_size": str(point.micro_batch_size),
        "optimizer.learning_rate": f"{rate:.6g}",
        "max_samples": str(int(_PATIENCE * point.samples)),
    }


def _common(case: Case) -> dict[str, str]:
    # Constant: the end of a schedule that falls would be another one at each setting.
    return {
        "task": case.task,
        "optimizer.schedule": "constant",
        "optimizer.warmup_samples": str(case.num_samples // 50),
        "log.eval_every_samples": str(case.num_samples // 40),
    }


def _layout(case: Case, begun: RunRecord, *, batch: int, replicas: int) -> StepShape:
    """Return how a batch is cut: into the micro-batches of the run, at least two in a step."""
    largest = int(max(row["batch/micro"] for row in begun.train))
    micro = min(largest, batch // 2, batch // replicas)
    assert batch % (micro * replicas) == 0, f"{case.task}: {batch} cannot be cut into {micro} on {replicas}"
    return StepShape(micro_batch_size=micro, accumulation_steps=batch // (micro * replicas), world_size=replicas)


def page(found: harness.Findings, *, case: Case) -> str:
    """Write the findings as a page."""
    figures = found.figures
    error, samples, seconds, steps = (f"{figures[name]:.0%}" for name in _ERRORS)
    held = "Yes" if figures["plan_median_error"] <= LARGEST_ERROR else "**No**"
    answer = (
        f"{held}: the median error is {error} (the goal is at most {LARGEST_ERROR:.0%}), {samples} in samples, "
        f"{seconds} in seconds, and {steps} in the time of a step. Of {figures['num_settings']:.0f} settings "
        f"{figures['num_given_up']:.0f} had to be given up."
    )
    paragraphs = [
        f"# {str(__doc__).strip()}",
        f"    python -m benchmarks.plan --task {case.task} --page benchmarks/results",
        answer,
        _lines("| figure | value |", "|---|---|", *(f"| `{name}` | {value:.4g} |" for name, value in figures.items())),
        "## Planned and measured",
        _table(found),
        _RUN.format(
            **harness.environment(device="CPU"),
            task=case.task,
            target=case.target,
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
{lowest:.4g}; the target, {target:g}, lies {further:.2g} times as far, in steps without noise. Each setting is then
trained from the start at its fixed batch, with the default's learning rate times the root of the batch's ratio, until
its held-out loss is at the target. Samples are read off straight lines between evaluations; seconds are those of
optimizer steps, without evaluations and saves. *Range* is by the noise scale's interval, the extrapolation, what the
all-reduce may be, and the error of the step times."""

_NOT_SHOWN = """## What the numbers do not show

- **Other machines.** Seconds are those of one machine that does nothing else meanwhile, and of two replicas at most.
- **Schedules.** A learning rate that falls at the end brings a loss that no power law of its beginning foresees.
- **A learning rate of each batch's own.** Searched for at each batch, it would give another frontier than the rule."""


def main() -> None:
    """Measure, tell, and write the page where asked to."""
    parser = harness.command_line(question=__doc__, name="plan")
    parser.add_argument("--task", choices=CASES, default="pysource", help="what is trained (%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FOLDER", help="write plan.md and plan.json there")
    options = parser.parse_args()
    if options.page is not None and options.json is None:
        options.json = str(options.page / "plan.json")
    found = measure(options.quick, task=options.task)
    harness.tell(found, options, question=__doc__, name="plan", device="CPU")
    if options.page is not None:
        case = CASES["digits" if options.quick else options.task]
        (options.page / "plan.md").write_text(page(found, case=case), encoding="utf-8")


if __name__ == "__main__":
    main()
