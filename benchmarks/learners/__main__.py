"""What do ways to cheaper training gain, and what do they do to the gradient noise?"""
# python -m benchmarks.learners [--json PATH|-] [--page FILE] [--parts NAME,…] [--branches-of NAME,…]
#                               [--earlier JSON,…] [--keep DIR] [--processes N] [--quick]

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.learners.branches import branch_once, has_samples_for_branches
from benchmarks.learners.expert_gradients import expert_errors
from benchmarks.learners.kept_runs import train_once
from benchmarks.learners.page import draw, page, with_earlier
from benchmarks.learners.pictures import check_installed, import_torchvision_first
from benchmarks.learners.runs import Arm
from benchmarks.learners.table import COLUMNS, branches_row, compare, margin_figures, trained_row
from benchmarks.learners.ways import WAYS
from dptrain.errors import ConfigError

_SEEDS = (0, 1, 2)
PARTS = (*WAYS, "experts", "branches")


def measure(
    quick: bool,  # noqa: FBT001 - the harness's own signature
    *,
    parts: Sequence[str] = PARTS,
    branches_of: Sequence[str] = tuple(WAYS),
    num_processes: int = 1,
    kept: Path | None = None,
) -> harness.Findings:
    """Train all arms of some parts, three seeds each, some runs at a time: they do not know of one another.

    Args:
        quick: shorter runs, two seeds.
        parts: which.
        branches_of: the ways whose arms the part `branches` is about.
        num_processes: runs at a time.
        kept: folder of the figures of runs; those that are there are not trained again.

    Returns:
        The findings. The critical batch sizes are rows of their own, which `with_earlier` joins to those of their arms.
    """
    seeds = _SEEDS[:2] if quick else _SEEDS
    rows: list[dict[str, Any]] = []
    # First, for it needs no training.
    figures = expert_errors(quick=quick) if "experts" in parts else {}
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(
            num_processes, mp_context=multiprocessing.get_context("spawn"), initializer=import_torchvision_first
        ) as pool,
    ):
        for part, way in WAYS.items():
            branched = "branches" in parts and part in branches_of
            if part in parts or branched:
                folder = Path(name) / part
                folder.mkdir()
                arms = list(way(folder, quick=quick))
                runs = _Runs(seeds=seeds, folder=folder, pool=pool, kept=kept)
                rows += _trained(arms, runs) if part in parts else []
                rows += _branched(arms, runs) if branched else []
    return harness.Findings(
        figures={**margin_figures(rows), **figures},
        rows=rows,
        columns=COLUMNS,
        note=f"Means over {len(seeds)} seeds ± their standard deviation; noise scales are medians. One replica each.",
    )


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """Where the runs of a way's arms take place.

    Attributes:
        seeds: of each arm.
        folder: of the way; what all runs start from lies there, too.
        pool: processes.
        kept: folder of the figures of runs; None keeps none.
    """

    seeds: Sequence[int]
    folder: Path
    pool: Executor
    kept: Path | None

    def results(self, once: Callable[..., dict[str, Any]], arms: Sequence[Arm]) -> list[list[dict[str, Any]]]:
        """Return for each arm what `once` returns for each seed.

        They go seed by seed, so that what is slow for a while is so for all arms.
        """
        futures = {
            (seed, number): self.pool.submit(
                # By number: arms of two tasks have one name.
                once,
                arm,
                seed=seed,
                folder=self.folder / f"{once.__name__}-{number}-{seed}",
                shared=self.folder,
                kept=self.kept,
            )
            for seed in self.seeds
            for number, arm in enumerate(arms)
        }
        return [[futures[seed, number].result() for seed in self.seeds] for number in range(len(arms))]


def _trained(arms: Sequence[Arm], runs: _Runs) -> list[dict[str, Any]]:
    """Return the rows of a way's arms, each compared with its control."""
    rows = [trained_row(arm, results) for arm, results in zip(arms, runs.results(train_once, arms), strict=True)]
    compare(rows, arms)
    print(*rows, sep="\n", file=sys.stderr)
    return rows


def _branched(arms: Sequence[Arm], runs: _Runs) -> list[dict[str, Any]]:
    """Return the critical batch sizes of a way's arms, as parts of rows that the arms have from training."""
    long = [has_samples_for_branches(arm) for arm in arms]
    results = iter(runs.results(branch_once, list(itertools.compress(arms, long))))
    rows = [branches_row(arm, next(results) if enough else ()) for arm, enough in zip(arms, long, strict=True)]
    print(*rows, sep="\n", file=sys.stderr)
    return rows


def main() -> None:
    """Run from the command line."""
    parser: argparse.ArgumentParser = harness.command_line(question=__doc__, name="learners")
    parser.add_argument("--page", metavar="FILE", type=Path, help="write the result as a page, with a figure beside it")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep figures of runs there, and train none twice")
    parser.add_argument("--earlier", metavar="JSON,…", help="earlier results whose rows stand beside those of this run")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="runs at a time")
    parser.add_argument("--parts", metavar="NAME,…", default=",".join(PARTS), help="what to measure; all by default")
    parser.add_argument(
        "--branches-of", metavar="NAME,…", default=",".join(WAYS), help="ways that the part branches is about; all"
    )
    options = parser.parse_args()
    parts, branches_of = _names(options.parts), _names(options.branches_of)
    if unknown := {*parts} - {*PARTS} or {*branches_of} - {*WAYS}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    earlier = [Path(text) for text in _names(options.earlier or "")]
    if missing := [path for path in earlier if not path.is_file()]:
        parser.error(f"there is no earlier result {missing[0]}")
    if "fine-tuning-pictures" in {*parts, *(branches_of if "branches" in parts else ())}:
        try:
            check_installed()
        except ConfigError as error:
            parser.error(f"part fine-tuning-pictures: {error}")
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    findings = measure(
        options.quick, parts=parts, branches_of=branches_of, num_processes=options.processes, kept=options.keep
    )
    findings = with_earlier(findings, earlier)
    if "branches" in parts and (lone := [row["arm"] for row in findings.rows if "loss" not in row]):
        parser.error(f"branches of {lone[0]} have no row to stand in: add its part, or --earlier with its result")
    assert all(math.isfinite(value) for value in findings.figures.values()), findings.figures
    name = "learners" if {*parts} == {*PARTS} else f"learners --parts {','.join(parts)}"
    name += f" --branches-of {','.join(branches_of)}" if {*branches_of} != {*WAYS} else ""
    name += f" --earlier {options.earlier}" if earlier else ""
    harness.tell(findings, options, question=__doc__, name=name, device="cpu")
    if options.page is not None:
        command = f"python -m benchmarks.{name}" + (" --quick" if options.quick else "")
        picture = options.page.with_suffix(".png")
        draw(findings.rows, picture)
        options.page.write_text(page(findings, command=command, figure=picture.name), encoding="utf-8")
    print(f"{time.monotonic() - began_s:.0f} s")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    main()
