"""Does adapting the batch reach a target sooner than a fixed batch that was searched for?"""
# python -m benchmarks.time_to_target --task digits|pysource|quadratic [--seeds N] [--results FOLDER] [--json -]

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.targets import page, results, theory
from benchmarks.targets.benchmark_case import benchmark_cases
from benchmarks.targets.comparison import hold
from benchmarks.targets.picture import draw_outcome

_TASKS = ("digits", "pysource", "quadratic")


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="time_to_target")
    parser.add_argument("--task", choices=_TASKS, required=True, help="what is trained")
    parser.add_argument("--seeds", type=int, default=None, help="of each variant (5; quick 1)")
    parser.add_argument("--results", metavar="FOLDER", type=Path, help="write page, JSON and picture there")
    options = parser.parse_args()
    if options.results is not None and not options.results.is_dir():
        parser.error(f"{options.results} is not a folder that exists")
    name = f"time_to_target --task {options.task}" + (f" --seeds {options.seeds}" if options.seeds else "")
    findings = _quadratic(options) if options.task == "quadratic" else _trained(options)
    if options.results is not None and options.json is None:
        options.json = str(options.results / f"time_to_target_{options.task}.json")
    harness.tell(findings, options, question=__doc__, name=name, device="cpu")


def _quadratic(options: argparse.Namespace) -> harness.Findings:
    found = theory.measure(quick=options.quick, num_seeds=options.seeds or (1 if options.quick else 5))
    if options.results is not None:
        path = options.results / "time_to_target_quadratic"
        theory.draw(found, path=path.with_suffix(".png"))
        path.with_suffix(".md").write_text(page.of_quadratic(found), encoding="utf-8")
    return found.findings


def _trained(options: argparse.Namespace) -> harness.Findings:
    case = benchmark_cases(quick=options.quick)[options.task]
    if options.quick:
        case = dataclasses.replace(case, batches=case.batches[1:6:2])
    num_seeds = options.seeds or (1 if options.quick else 5)
    outcome = hold(case, num_seeds=num_seeds, tell=lambda text: print(text, file=sys.stderr, flush=True))
    figures = results.figures(outcome)
    findings = harness.Findings(
        figures=figures,
        rows=results.rows(outcome) + results.search_rows(outcome),
        columns=page.COLUMNS,
        note=page.note(outcome, figures),
    )
    if options.results is not None:
        path = options.results / f"time_to_target_{options.task}"
        title = f"{options.task}: held-out loss of {case.target:g} on two replicas"
        draw_outcome(outcome, title=title, path=path.with_suffix(".png"))
        path.with_suffix(".md").write_text(page.of_comparison(outcome, figures, task=options.task), encoding="utf-8")
    return findings


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
