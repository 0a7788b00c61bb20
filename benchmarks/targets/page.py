"""The pages of `benchmarks/results/time_to_target_<task>.md`, written from what was found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.result_tables import figures_table
from benchmarks.targets import results
from benchmarks.targets.results import ADAPTDL, ADAPTIVE, RULES_COMPARED, Outcome, fixed_name, rule_name
from benchmarks.targets.theory import Theory

QUESTION = "Does adapting the batch reach a target sooner than a fixed batch that was searched for?"
COLUMNS = {
    "variant": "{variant}",
    "steps (least–most)": "{shown_steps}",
    "samples": "{shown_samples}",
    "seconds": "{shown_seconds}",
    "to best fixed": "{shown_ratio}",
    "product": "{shown_product}",
}
_LONGEST_DEFAULT, _LONGEST_FAR, _CHEAPEST_SEARCH, _LARGEST_TIME_ERROR = 1.05, 1.15, 5.0, 0.1
_EQUAL = 0.02
"""Ratios of times that near to 1 are no gain and no loss."""


def note(outcome: Outcome, figures: Mapping[str, float]) -> str:
    """Return the verdicts in one line."""
    ratio = figures.get("adaptive_over_best_fixed", math.inf)
    best = f"the best fixed batch ({outcome.best})"
    if ratio < 1 - _EQUAL:
        gain = f"{1 - ratio:.0%} fewer seconds than {best}"
    elif math.isfinite(ratio):
        gain = f"NO GAIN over {best}: {ratio:.2f} times its seconds"
    else:
        gain = "the adaptive run did NOT ARRIVE"
    verdicts = [f"{bound}: {'held' if holds else 'BROKEN'}" for bound, holds in _bounds(figures).items()]
    return "; ".join([gain, *verdicts])


def _bounds(figures: Mapping[str, float]) -> dict[str, bool]:
    def least(name: str) -> float:
        return figures.get(name, math.inf)

    return {
        f"default start up to {_LONGEST_DEFAULT}": least("adaptive_over_best_fixed") <= _LONGEST_DEFAULT,
        f"from 16 times too small up to {_LONGEST_FAR}": least("adaptive_from_small_over_best_fixed") <= _LONGEST_FAR,
        f"from 16 times too large up to {_LONGEST_FAR}": least("adaptive_from_large_over_best_fixed") <= _LONGEST_FAR,
        f"searches included at least {_CHEAPEST_SEARCH:g} times cheaper": figures.get("search_cost_ratio", 0.0)
        >= _CHEAPEST_SEARCH,
        f"step times of unseen shapes within {_LARGEST_TIME_ERROR:.0%}": least("step_time_error")
        <= _LARGEST_TIME_ERROR,
        "loss at equal samples within the spread of seeds": least("final_loss_gap")
        <= figures.get("final_loss_spread", 0.0),
        "fewer seconds than AdaptDL": least("adaptdl_ratio") < 1,
    }


def of_comparison(outcome: Outcome, figures: Mapping[str, float], *, task: str) -> str:
    """Return the page of digits or pysource."""
    frontier = outcome.frontier()
    searches = [[row["variant"], row["shown_steps"], row["shown_seconds"]] for row in results.search_rows(outcome)]
    return joined(
        f"# {QUESTION}",
        f"    python -m benchmarks.time_to_target --task {task} --results benchmarks/results",
        f"On `{task}`: {note(outcome, figures)}.",
        figures_table(figures).rstrip(),
        "## What was run",
        _about_the_runs(outcome, task=task),
        *_other_far_starts(outcome),
        _CELLS,
        table(list(COLUMNS), [_cells(row) for row in results.rows(outcome)]),
        f"**The frontier** of the fixed batches: {frontier or 'none, too few batches arrived'}.{_failed(outcome)}",
        f"![The graph of steps against samples](time_to_target_{task}.png)",
        "## Learning-rate rules",
        "The adaptive law with each rule from the default start, all at the base rate found for `root_gain`.",
        _rules_table(outcome),
        "## What the searches cost",
        table(["variant", "rates tried", "seconds"], searches),
        _SEARCH_COST,
        "## AdaptDL",
        _about_adaptdl(outcome, figures),
        "## What the numbers do not show",
        _NOT_SHOWN,
    )


_CELLS = """\
Each cell is the median with the least and the most over seeds. *To best fixed*: seconds to those of the best fixed
batch, seed by seed, the median. *Product*: (S/S_min − 1)(E/E_min − 1) on the fitted frontier: 1 on it, less where
both steps and samples were saved."""

_SEARCH_COST = """\
`search_cost_ratio` is what all the searches of fixed batches took, with one run at the best, over what the one search
of the adaptive variant and one of its runs took. A failed search counts, since nobody knows beforehand; without
those it is `search_cost_ratio_without_failed`."""

_NOT_SHOWN = """\
- **GPUs**, where the time of a step is flat up to saturation, and **more than two replicas**.
- **Another target.** The best batch grows with the noise scale, and so with a lower target.
- **A schedule of the rate.** All variants keep it constant. The two whose batches are written down beforehand know the
  best batch and its samples from the sweep, which the others do not."""

_RUNS = """\
dptrain {dptrain} on torch {torch} and Python {python}: two gloo replicas of one thread each on {cpu_count} cores of
{processor}. Task `{task}` ({options}), target: a held-out loss of {target:g}. The fixed batches are plain runs in
which nothing is measured (`control.mode=off`), each at its own learning rate: the best of at least four on a grid of
factors of two, widened until the best one has a worse one on both sides, with a seed of its own; the best one and its
neighbours, where they arrived, are run with two further seeds, and the one whose slowest seed is fastest is taken. The
adaptive runs have dptrain's default law and rule. They have one search among them, from the task's default batch
({default_batch}); 16 times below and above the best fixed one of the searches they start with the rate found there, as
`optimizer.reference_batch_size` hands it over. Runs of a search are given up at 1.25 times the steps of its best one,
an adaptive one at 2.5 times, and with a further seed at twice that. All variants are then run with {num_seeds} more
seeds, seed by seed, in an order that changes, those whose batch is not fixed for at most twice the seconds of the best
search.

The rate is constant after a warm-up of {warmup_samples:,} samples. Seconds are those of training, without start and
evaluation; steps and samples are exact. The target is reached at the first evaluation at or below it, and between two
evaluations by the logarithm of the loss. After the timed runs the fixed batches take turns of some 80 steps, three per
seed: `step_time_error` is how far off the model is, in the median over shapes, on a shape outside its fit."""

ABOUT_TASKS = {
    "digits": "an autoencoder of layers 64-96-48-8-48-96-64, the mean squared error of a pixel",
    "pysource": "a model of 30,000 parameters, 16 bytes of context, 512 held-out windows",
}

_ADAPTDL = """\
AdaptDL's own `GradientNoiseScale`, `goodput.py` and AdamScale's rule (the root of the gain), in dptrain's loop with
dptrain's measuring off, from the default batch with the rate of the adaptive run. Where the package `autograd` is not
installed, its fit takes differences for derivatives. It decides after 30 steps and whenever their number has grown by
half, where AdaptDL itself does so once an epoch with times fitted every 30 seconds, and on powers of two times the
first batch. The time of its fit is not counted. Its rate is one for the whole model, where AdaptDL's has one for
each group of parameters; here there is one group."""


def _about_the_runs(outcome: Outcome, *, task: str) -> str:
    case = outcome.case
    return _RUNS.format(
        **harness.environment(device="cpu"),
        task=task,
        options=ABOUT_TASKS[task],
        target=case.target,
        default_batch=case.default_batch,
        num_seeds=len(outcome.finishes[fixed_name(outcome.best)]),
        warmup_samples=case.warmup_samples,
    )


def _other_far_starts(outcome: Outcome) -> list[str]:
    """Say how far off the far starts were where the seeds have another batch first than the searches had."""
    searched, best = results.best_searched(outcome.searches), outcome.best
    if searched == best:
        return []
    small, large = results.far_starts(searched).values()
    starts = f"**The far starts** are {small:,} and {large:,}, for the searches had {searched:,} first."
    off = f"they are {best / small:g} times too small and {large / best:g} times too large"
    return [f"{starts} Of {best:,}, which the further seeds have first, {off}."]


def _failed(outcome: Outcome) -> str:
    """Name the fixed batches of the sweep that no learning rate brought to the target."""
    batches = [str(batch) for batch in outcome.failed_searches]
    if not batches:
        return ""
    most = f"{outcome.case.most_steps:,} steps"
    return f" Not at the target with any rate that was tried, in up to {most}: fixed {' and '.join(batches)}."


def _about_adaptdl(outcome: Outcome, figures: Mapping[str, float]) -> str:
    if ADAPTDL in outcome.absent:
        return f"Absent: {outcome.absent[ADAPTDL]}."
    ratio = figures.get("adaptdl_ratio")
    if ratio is None:
        return _ADAPTDL
    num_lost = sum(finish.end is None for finish in outcome.finishes[ADAPTDL].values())
    until_then = f", counted until it was given up where it did not arrive ({num_lost} seeds)" if num_lost else ""
    return f"{_ADAPTDL} The adaptive run needs {ratio:.2f} times its seconds{until_then}."


def _rules_table(outcome: Outcome) -> str:
    names = {"root_gain (default)": ADAPTIVE} | {rule: rule_name(rule) for rule in RULES_COMPARED}
    rows = {row["variant"]: row for row in results.rows(outcome)}
    return table(
        ["rule", *list(COLUMNS)[1:]], [[rule, *_cells(rows[name])[1:]] for rule, name in names.items() if name in rows]
    )


def of_quadratic(theory: Theory) -> str:
    """Return the page of the quadratic problems."""
    columns, rows = theory.findings.columns, theory.findings.rows
    return joined(
        f"# {QUESTION}",
        "    python -m benchmarks.time_to_target --task quadratic --results benchmarks/results",
        f"On problems whose answer is known: {theory.findings.note}.",
        figures_table(theory.findings.figures).rstrip(),
        "## What was run",
        _PROBLEMS,
        table(list(columns), [[cell.format_map(row) for cell in columns.values()] for row in rows]),
        "![The graphs of both problems](time_to_target_quadratic.png)",
        "## What the numbers do not show",
        _NOT_SHOWN_BY_THEORY,
    )


_PROBLEMS = """\
dptrain's own laws and limits, driven step by step; nothing here is timed. **Problem 5** is SGD on an isotropic
quadratic at the learning rate a/(1 + φ/B) over the curvature, a = 0.002, φ = 5/u from u = 1 down to 0.01. Its
frontier is a hyperbola, and the best adaptive product is γ = 4·tanh(ln R/4)/ln R with R = 100. *Exact*: the law is
given φ, as an interval of no width. *Measured*: gradients of 1,000 dimensions are drawn for two replicas, and the law
is given what dptrain's estimator makes of their norms; of the seeds the middle one is shown. *Every second batch*: all
multiples of the replicas, no waiting. *Powers of two*: dptrain's default grid points, which round by up to √2, and ten
decisions between changes: that costs some 4 %.

The learning rate stays the problem's, by the true φ, but for the last adaptive row. At a rate so far below the best
one whatever makes it larger looks like progress, and a measured φ that lags behind a growing one does: what that row
saves is no merit of its batch.

**Problem 10** has curvature and gradient noise 1/i in 1,000 directions, in the mean. Fixed batches have the best
constant rate each; an adaptive run has one base rate, searched for at its first batch. The figure is of rule `none`,
where the batch alone moves, at the exchange rate where it saves least. The gain rule lets the rate rise above what
any constant one could be and holds the stiffest direction at the edge of stability: it saves, where it does, by the
rate."""

_NOT_SHOWN_BY_THEORY = """\
- **A problem that nobody has solved.** That is what `--task digits` and `--task pysource` are for.
- **Time.** The exchange rate r, the samples that one step fewer is worth, is given here; on hardware it is measured."""


def joined(*parts: str) -> str:
    """Return a page of these paragraphs."""
    return "\n\n".join(parts) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [template.format_map(row) for template in COLUMNS.values()]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
