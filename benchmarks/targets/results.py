"""The results of a comparison: medians, ratios and the figures; nothing is run and nothing is drawn here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.targets.benchmark_case import BenchmarkCase, Search
from benchmarks.targets.timed_run import WORLD_SIZE, Finish, Mark
from dptrain.batch import BatchPlan
from dptrain.control import StepTimes
from dptrain.explain.model.adaptive import adaptive_side
from dptrain.explain.model.frontier import Frontier, Point, fit_frontier

_TIMED_STEPS = 10
ADAPTIVE, FROM_SMALL, FROM_LARGE = "adaptive", "adaptive from small", "adaptive from large"
ADAPTDL, SMITH, RAMP = "AdaptDL", "batch doubles (Smith)", "linear ramp"
RULES_COMPARED = ("none", "linear", "square_root", "gain", "surge")
_FAR = 16
"""How many times too small and too large the batches are at which adaptive runs begin."""
_SMALLEST_START = 4


def fixed_name(batch: int) -> str:
    """Return the name of the variant of a fixed batch."""
    return f"fixed {batch}"


def rule_name(rule: str) -> str:
    """Return the name of the adaptive variant with another learning-rate rule."""
    return f"adaptive, rule {rule}"


def best_searched(searches: Mapping[int, Search]) -> int:
    """Return the batch that is first by the runs of the searches, all of which succeeded."""
    return min(searches, key=lambda batch: searches[batch].end.seconds)


def far_starts(best: int) -> dict[str, int]:
    """Return the batches at which the adaptive runs begin that are to find their way to `best`."""
    return {FROM_SMALL: max(best // _FAR, _SMALLEST_START), FROM_LARGE: best * _FAR}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that was run in a comparison.

    Attributes:
        comparison: the task and its range.
        searches: of the fixed batches' learning rates.
        failed_searches: those of fixed batches that no rate brought to the target.
        adaptive_search: of the adaptive runs, from the default batch; all starts take what it found.
        finishes: by variant and seed.
        step_s: the time of a step of the fixed batches, by (micro-batch, accumulation steps), timed in turns.
        rates: learning rate of each variant, at the batch that it is for.
        absent: variants that could not run, and why.
    """

    case: BenchmarkCase
    searches: Mapping[int, Search]
    failed_searches: Mapping[int, Search]
    adaptive_search: Search
    finishes: Mapping[str, Mapping[int, Finish]]
    step_s: Mapping[tuple[int, int], float]
    rates: Mapping[str, float]
    absent: Mapping[str, str]

    @property
    def best(self) -> int:
        """The fixed batch with the fewest seconds, in the median over seeds."""
        return min(self.searches, key=lambda batch: self.median(fixed_name(batch), "seconds"))

    def ends(self, variant: str) -> dict[int, Mark]:
        """Return where a variant reached the target, by seed, where it did."""
        return {seed: finish.end for seed, finish in self.finishes.get(variant, {}).items() if finish.end is not None}

    def median(self, variant: str, what: str) -> float:
        """Return the median of steps, samples or seconds over seeds; infinite where most seeds did not arrive."""
        values = [
            math.inf if finish.end is None else float(getattr(finish.end, what))
            for finish in self.finishes.get(variant, {}).values()
        ]
        return statistics.median(values) if values else math.inf

    def ratio(self, variant: str, what: str, *, over: str) -> float:
        """Return the median over seeds of a variant's figure to that of another with the same seed."""
        others = self.ends(over)
        ratios = [
            math.inf if finish.end is None else getattr(finish.end, what) / getattr(others[seed], what)
            for seed, finish in self.finishes.get(variant, {}).items()
            if seed in others
        ]
        return statistics.median(ratios) if ratios else math.inf

    def frontier(self) -> Frontier | None:
        """Fit the frontier to all fixed runs that arrived; None where too few batches did."""
        points = [
            Point(global_batch_size=batch, steps=end.steps, seed=seed)
            for batch in self.searches
            for seed, end in self.ends(fixed_name(batch)).items()
        ]
        return fit_frontier(points) if len({point.global_batch_size for point in points}) > 2 else None


def figures(outcome: Outcome) -> dict[str, float]:
    """Return the figures of a comparison; those that do not exist are left out."""
    best = fixed_name(outcome.best)
    found = {
        "adaptive_over_best_fixed": outcome.ratio(ADAPTIVE, "seconds", over=best),
        "adaptive_from_small_over_best_fixed": outcome.ratio(FROM_SMALL, "seconds", over=best),
        "adaptive_from_large_over_best_fixed": outcome.ratio(FROM_LARGE, "seconds", over=best),
        "search_cost_ratio": search_cost_ratio(outcome),
        "search_cost_ratio_without_failed": search_cost_ratio(outcome, with_failed=False),
        "steps_ratio": outcome.ratio(ADAPTIVE, "steps", over=best),
        "samples_ratio": outcome.ratio(ADAPTIVE, "samples", over=best),
        "best_fixed_steps": outcome.median(best, "steps"),
        "best_fixed_batch": float(outcome.best),
        "step_time_error": statistics.median(errors) if (errors := step_time_errors(outcome)) else math.inf,
        "step_time_error_max": max(errors, default=math.inf),
        "adaptdl_ratio": adaptdl_ratio(outcome),
    }
    gaps, spread = loss_gaps(outcome), loss_spread(outcome)
    found |= {"final_loss_gap": statistics.median(gaps) if gaps else math.inf, "final_loss_spread": spread}
    found |= _plane(outcome)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _plane(outcome: Outcome) -> dict[str, float]:
    frontier = outcome.frontier()
    found = {"gamma_predicted": predicted_gamma(outcome)}
    if frontier is None or not frontier.is_fitted:
        return found
    products = [product(outcome, fixed_name(batch), frontier) for batch in outcome.searches]
    known = [value for value in products if math.isfinite(value)]
    return found | {
        "frontier_product": max(known, key=lambda value: abs(math.log(max(value, 1e-9)))) if known else math.inf,
        "gamma_measured": product(outcome, ADAPTIVE, frontier),
    }


def product(outcome: Outcome, variant: str, frontier: Frontier) -> float:
    """Return (S/S_min − 1)(E/E_min − 1) of a variant's medians; 1 on the frontier, below it less."""
    assert frontier.min_steps is not None
    assert frontier.min_samples is not None
    min_steps, min_samples = frontier.min_steps.value, frontier.min_samples.value
    if min_steps is None or min_samples is None:
        return math.inf
    steps, samples = outcome.median(variant, "steps"), outcome.median(variant, "samples")
    return max(steps / min_steps - 1, 0.0) * max(samples / min_samples - 1, 0.0)


def predicted_gamma(outcome: Outcome) -> float:
    """Return γ by the noise scale along the adaptive runs: the least product that any choice of batches allows."""
    found = []
    for finish in outcome.finishes.get(ADAPTIVE, {}).values():
        rows = [row for row in finish.rows if row.get("noise_scale/value")]
        if rows:
            side = adaptive_side(
                noise_scales=[row["noise_scale/value"] for row in rows],
                global_batch_sizes=[row["batch/global"] for row in rows],
            )
            found.append(side.gamma)
    return statistics.median(found) if found else math.inf


def search_cost_ratio(outcome: Outcome, *, with_failed: bool = True) -> float:
    """Return the seconds of the whole way with fixed batches, searches and a run, to those with the adaptive one.

    The searches at batches that no rate brought to the target count, too, unless asked otherwise: nobody knows before.
    """
    fixed = sum(search.seconds for search in outcome.searches.values())
    if with_failed:
        fixed += sum(search.seconds for search in outcome.failed_searches.values())
    fixed += outcome.median(fixed_name(outcome.best), "seconds")
    return fixed / (outcome.adaptive_search.seconds + outcome.median(ADAPTIVE, "seconds"))


def adaptdl_ratio(outcome: Outcome) -> float:
    """Return the median over seeds of the adaptive run's seconds to AdaptDL's.

    Where AdaptDL was given up, they are to its seconds until then: the true ratio is smaller.
    """
    others = outcome.finishes.get(ADAPTDL, {})
    ratios = [
        math.inf if finish.end is None else finish.end.seconds / (other.end or other.marks[-1]).seconds
        for seed, finish in outcome.finishes.get(ADAPTIVE, {}).items()
        if (other := others.get(seed)) is not None
    ]
    return statistics.median(ratios) if ratios else math.inf


def step_time_errors(outcome: Outcome) -> list[float]:
    """Return how far off the time of each shape of the fixed batches is predicted from all the other shapes."""
    times = outcome.step_s
    return [abs(_predicted(shape, times) / seconds - 1) for shape, seconds in times.items()]


def _predicted(unseen: tuple[int, int], typical: Mapping[tuple[int, int], float]) -> float:
    times = StepTimes()
    for shape, seconds in typical.items():
        if shape != unseen:
            for _ in range(_TIMED_STEPS):
                times = times.timed(_shape(shape), seconds)
    model = times.model()
    return math.inf if model is None else model.seconds(_shape(unseen))


def _shape(shape: tuple[int, int]) -> BatchPlan:
    return BatchPlan(micro_batch_size=shape[0], accumulation_steps=shape[1], world_size=WORLD_SIZE)


def loss_gaps(outcome: Outcome) -> list[float]:
    """Return by how much the adaptive run's loss is above the target where the best fixed run of the seed has it."""
    finishes = outcome.finishes.get(ADAPTIVE, {})
    return [
        loss_gap(finishes[seed], samples=end.samples, target=outcome.case.target)
        for seed, end in outcome.ends(fixed_name(outcome.best)).items()
        if seed in finishes
    ]


def loss_gap(finish: Finish, *, samples: float, target: float) -> float:
    """Return by how much a run's loss is above the target after some samples.

    A run that was over by then, at the target with fewer samples, counts by its last loss, which is no better than what
    it would have had; one that was given up before both counts as infinitely far.
    """
    is_known = finish.end is not None or any(mark.samples >= samples for mark in finish.marks)
    return loss_at(finish, samples) - target if is_known else math.inf


def loss_spread(outcome: Outcome) -> float:
    """Return the standard deviation over seeds of the best fixed run's loss, where the first seed is at the target."""
    finishes = outcome.finishes[fixed_name(outcome.best)].values()
    return spread_of_losses(finishes) if len(finishes) > 1 else math.inf


def spread_of_losses(finishes: Collection[Finish]) -> float:
    """Return the standard deviation of the losses of some runs where the first of them is at the target."""
    earliest = min(finish.end.samples for finish in finishes if finish.end is not None)
    return statistics.stdev(loss_at(finish, earliest) for finish in finishes)


def loss_at(finish: Finish, samples: float) -> float:
    """Return the held-out loss after some samples, between two evaluations by interpolation."""
    return float(np.interp(samples, [mark.samples for mark in finish.marks], [mark.loss for mark in finish.marks]))


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Return a row for each variant: medians with their spread, the rate, and the place in the steps-samples graph."""
    frontier = outcome.frontier()
    found = [_row(outcome, variant, frontier) for variant in outcome.finishes]
    return found + [
        {**_blank(variant), "shown_seconds": f"absent: {reason}"} for variant, reason in outcome.absent.items()
    ]


def _row(outcome: Outcome, variant: str, frontier: Frontier | None) -> dict[str, Any]:
    ends, num_seeds = outcome.ends(variant), len(outcome.finishes[variant])
    reasons = sorted({finish.reason for finish in outcome.finishes[variant].values() if finish.end is None})
    best = fixed_name(outcome.best)
    row: dict[str, Any] = {
        **_blank(variant),
        "learning_rate": outcome.rates[variant],
        "seeds": num_seeds,
        "arrived": len(ends),
        "not_arrived": "; ".join(reasons),
        "runs": [
            {"seed": seed, "steps": end.steps, "samples": end.samples, "seconds": end.seconds}
            for seed, end in ends.items()
        ],
    }
    for what in ("steps", "samples", "seconds"):
        if ends:
            row[f"shown_{what}"] = spread([float(getattr(end, what)) for end in ends.values()])
            row[what] = statistics.median(float(getattr(end, what)) for end in ends.values())
    ratio = outcome.ratio(variant, "seconds", over=best)
    if math.isfinite(ratio):
        row |= {"ratio": ratio, "shown_ratio": f"{ratio:.3f}"}
    if frontier is not None and frontier.is_fitted and math.isfinite(value := product(outcome, variant, frontier)):
        row |= {"product": value, "shown_product": f"{value:.2f}"}
    if len(ends) < num_seeds:
        row["shown_seconds"] += f" ({num_seeds - len(ends)} of {num_seeds} not: {row['not_arrived']})"
    return row


def _blank(variant: str) -> dict[str, Any]:
    names = ("shown_steps", "shown_samples", "shown_seconds", "shown_ratio", "shown_product")
    return {"variant": variant, **dict.fromkeys(names, "")}


def spread(values: Sequence[float]) -> str:
    """Write the median with the smallest and the largest value."""
    return f"{statistics.median(values):,.4g} ({min(values):,.4g}–{max(values):,.4g})"


def search_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Return a row for each search: the rates that were tried, with what they took."""
    swept = {**outcome.searches, **outcome.failed_searches}
    named = {f"search, {fixed_name(batch)}": swept[batch] for batch in sorted(swept)}
    adaptive = {f"search, {ADAPTIVE}": outcome.adaptive_search}
    return [_search_row(name, search) for name, search in {**named, **adaptive}.items()]


def _search_row(name: str, search: Search) -> dict[str, Any]:
    tried = {
        f"{rate:.3g}": None if finish.end is None else finish.end.steps
        for rate, finish in sorted(search.finishes.items())
    }
    at_edge = search.best in (min(search.finishes), max(search.finishes))
    return {
        **_blank(name),
        "learning_rate": search.best,
        "steps_by_rate": tried,
        "seconds": search.seconds,
        "at_edge": at_edge,
        "shown_steps": f"{'none' if search.best is None else f'best {search.best:.3g}'} of {len(tried)} rates",
        "shown_seconds": f"{search.seconds:,.4g}",
    }
