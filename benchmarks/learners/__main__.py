"""What do ways to cheaper training gain, and what do they do to the gradient noise?"""
# python -m benchmarks.learners [--json PATH|-] [--page FILE] [--parts NAME,…] [--earlier JSON,…] [--keep DIR] [--quick]

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.learners.branches import branch_once, critical_text
from benchmarks.learners.expert_gradients import expert_parallel_error, experts_gradient_error
from benchmarks.learners.kept_runs import train_once
from benchmarks.learners.page import UNKNOWN, draw, page, with_earlier
from benchmarks.learners.pictures import check_installed, import_torchvision_first
from benchmarks.learners.runs import REPLICAS, Arm
from benchmarks.learners.ways import WAYS
from dptrain.errors import ConfigError

_SEEDS = (0, 1, 2)
PARTS = (
    "fine-tuning",
    "fine-tuning-pictures",
    "sparsity",
    "distillation",
    "experts",
    "mixture",
    "small-batches",
    "branches",
)
_BRANCHED = ("sparsity", "fine-tuning")
"""Ways whose arms take seconds, so that their critical batch sizes can be measured by branches."""
_UNRESOLVED = "not resolved"


def measure(
    quick: bool,  # noqa: FBT001 - the harness's own signature
    *,
    parts: Sequence[str] = PARTS,
    num_processes: int = 1,
    kept: Path | None = None,
) -> harness.Findings:
    """Train all arms of some parts, three seeds each, some runs at a time: they do not know of one another.

    Args:
        quick: shorter runs, two seeds.
        parts: which.
        num_processes: runs at a time.
        kept: folder of the figures of runs; those that are there are not trained again.
    """
    seeds = _SEEDS[:2] if quick else _SEEDS
    rows: list[dict[str, Any]] = []
    # First, for it needs no training.
    sizes = (1, 2) if quick else (1, 2, 4)
    errors = [experts_gradient_error(world_size) for world_size in sizes] if "experts" in parts else []
    layouts = [(2, 2)] if quick else [(2, 2), (4, 2), (4, 4)]
    shared = [expert_parallel_error(number, size=size) for number, size in layouts] if "experts" in parts else []
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(
            num_processes, mp_context=multiprocessing.get_context("spawn"), initializer=import_torchvision_first
        ) as pool,
    ):
        for number, (part, way) in enumerate(WAYS.items()):
            if part not in parts:
                continue
            folder = Path(name) / str(number)
            folder.mkdir()
            arms = list(way(folder, quick=quick))
            # Seed by seed, so that what is slow for a while is so for all arms.
            jobs = [(arm, seed) for seed in seeds for arm in arms]
            futures = [
                pool.submit(train_once, arm, seed=seed, folder=folder / f"run-{at}", shared=folder, kept=kept)
                for at, (arm, seed) in enumerate(jobs)
            ]
            found = [future.result() for future in futures]
            for at, arm in enumerate(arms):
                rows.append(_row(arm, found[at :: len(arms)]))
                print(rows[-1], file=sys.stderr)
            _compare(rows, arms)
        rows += _branches(Path(name), pool, seeds=seeds, quick=quick, kept=kept) if "branches" in parts else []
    return harness.Findings(
        figures={
            **_figures(rows),
            **({"experts_gradient_error": max(errors), "expert_parallel_error": max(shared)} if errors else {}),
        },
        rows=rows,
        columns={
            "way": "{way}",
            "arm": "{arm}",
            "held-out loss": "{loss:.4f} ± {loss_spread:.4f}",
            "accuracy": "{accuracy_text}",
            "GFLOP": "{gflop:.3g}",
            "by density": "{sparse_text}",
            "gradients": "{gradients_text}",
            "noise scale early": "{noise_early}",
            "late": "{noise_late}",
            "critical batch by `branch`": "{critical_text}",
            **{f"{number} replicas": f"{{speed_up_{number}}}" for number in REPLICAS},
            "against its control": "{verdict}",
        },
        note=f"Means over {len(seeds)} seeds ± their standard deviation; noise scales are medians. One replica each.",
    )


def _branches(
    folder: Path, pool: Executor, *, seeds: Sequence[int], quick: bool, kept: Path | None
) -> list[dict[str, Any]]:
    """Return the critical batch sizes of small arms, as parts of rows that the arms have from training."""
    rows = []
    for number, name in enumerate(_BRANCHED):
        shared = folder / f"branches-{number}"
        shared.mkdir()
        arms = list(WAYS[name](shared, quick=quick))
        # Seed by seed, as runs are. By number: arms of two tasks have one name.
        futures = [
            pool.submit(branch_once, arm, seed=seed, folder=shared / f"run-{at}-{seed}", shared=shared, kept=kept)
            for seed in seeds
            for at, arm in enumerate(arms)
        ]
        for at, arm in enumerate(arms):
            found = [future.result() for future in futures[at :: len(arms)]]
            stamps = {f"branches {result['measured']} ({result['source']})" for result in found}
            rows.append(
                {
                    "way": arm.way,
                    "arm": arm.name,
                    "critical_text": critical_text(found),
                    "branches": [result["losses"] for result in found],
                    "measured": "; ".join(sorted(stamps)),
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


def _row(arm: Arm, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    losses = [result["loss"] for result in results]
    accuracies = [result["accuracy"] for result in results if result["accuracy"] is not None]
    sparse = results[0]["sparse_flops"]
    return {
        "way": arm.way,
        "arm": arm.name,
        "loss": statistics.mean(losses),
        "loss_spread": statistics.stdev(losses),
        "accuracy_text": f"{statistics.mean(accuracies):.3f}" if accuracies else "–",
        "seconds": statistics.mean(result["seconds"] for result in results),
        "gflop": results[0]["flops"] / 1e9,
        "sparse_text": "–" if sparse is None else f"{sparse / 1e9:.3g}",
        "noise_early": _median(result["noise_early"] for result in results),
        "noise_late": _median(result["noise_late"] for result in results),
        "gradient_bytes": results[0]["gradient_bytes"],
        "gradients_text": f"{results[0]['gradient_bytes'] / 1e6:.3g} MB",
        **{f"speed_up_{number}": _speed_up(results, number) for number in REPLICAS},
        "measured": "; ".join(sorted({f"{result['measured']} ({result['source']})" for result in results})),
        "losses": " ".join(f"{loss:.5f}" for loss in losses),
        "critical_text": UNKNOWN,
        "verdict": "–",
    }


def _median(values: Iterator[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g}" if known else _UNRESOLVED


def _speed_up(results: Sequence[Mapping[str, Any]], number: int) -> str:
    """Return the median over the seeds that `plan` plans for, with how many those are where it refuses some."""
    found = [result["speed_up"][str(number)] for result in results]
    planned = [value for value in found if not isinstance(value, str)]
    if not planned:
        return "not planned"
    part = "" if len(planned) == len(found) else f" ({len(planned)} of {len(found)} seeds)"
    return f"{statistics.median(planned):.2g}×{part}"


def _compare(rows: list[dict[str, Any]], arms: Sequence[Arm]) -> None:
    """Say of each arm how far it is below its control, in units of the larger spread of the two."""
    found = {(row["way"], row["arm"]): row for row in rows}
    for arm in arms:
        if arm.control is not None:
            row, control = found[arm.way, arm.name], found[arm.way, arm.control]
            margin = _margin(row, control)
            row["margin"] = margin
            gain = "gain" if margin > 1 else "loss" if margin < -1 else "no gain"
            row["verdict"] = f"{gain} over {arm.control}: {margin:+.1f} spreads"


def _margin(row: Mapping[str, Any], control: Mapping[str, Any]) -> float:
    spread = max(row["loss_spread"], control["loss_spread"], 1e-12)
    return float((control["loss"] - row["loss"]) / spread)


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    margins = {(row["way"], row["arm"]): row["margin"] for row in rows if "margin" in row}
    figures = {}
    for name, arm in (
        ("finetune_margin_in_spreads", ("fine-tuning", "all weights")),
        ("finetune_pictures_margin_in_spreads", ("fine-tuning, EfficientNet-Lite0", "all weights")),
        ("distill_margin_in_spreads", ("distillation", "taught")),
    ):
        if arm in margins:
            figures[name] = margins[arm]
    if orders := [margin > 0 for (_, arm), margin in margins.items() if arm == "rigl"]:
        figures["rigl_order_holds"] = float(all(orders))
    return figures


def main() -> None:
    """Run from the command line."""
    parser: argparse.ArgumentParser = harness.command_line(question=__doc__, name="learners")
    parser.add_argument("--page", metavar="FILE", type=Path, help="write the result as a page, with a figure beside it")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep figures of runs there, and train none twice")
    parser.add_argument("--earlier", metavar="JSON,…", help="earlier results whose rows stand beside those of this run")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="runs at a time")
    parser.add_argument("--parts", metavar="NAME,…", default=",".join(PARTS), help="what to measure; all by default")
    options = parser.parse_args()
    parts = [part.strip() for part in options.parts.split(",")]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    earlier = [Path(text.strip()) for text in (options.earlier or "").split(",") if text.strip()]
    if missing := [path for path in earlier if not path.is_file()]:
        parser.error(f"there is no earlier result {missing[0]}")
    if "fine-tuning-pictures" in parts:
        try:
            check_installed()
        except ConfigError as error:
            parser.error(f"part fine-tuning-pictures: {error}")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    findings = measure(options.quick, parts=parts, num_processes=options.processes, kept=options.keep)
    findings = with_earlier(findings, earlier)
    if "branches" in parts and (lone := [row["arm"] for row in findings.rows if "loss" not in row]):
        parser.error(f"branches of {lone[0]} have no row to stand in: add its part, or --earlier with its result")
    assert all(math.isfinite(value) for value in findings.figures.values()), findings.figures
    name = "learners" if tuple(parts) == PARTS else f"learners --parts {','.join(parts)}"
    name += f" --earlier {options.earlier}" if earlier else ""
    harness.tell(findings, options, question=__doc__, name=name, device="cpu")
    if options.page is not None:
        command = f"python -m benchmarks.{name}" + (" --quick" if options.quick else "")
        picture = options.page.with_suffix(".png")
        draw(findings.rows, picture)
        options.page.write_text(page(findings, command=command, figure=picture.name), encoding="utf-8")
    print(f"{time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
