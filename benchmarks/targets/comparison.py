"""Runs a comparison from the searches to the last seed, variants in turn: a slow spell of the machine hits all."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.targets import adaptdl_policy
from benchmarks.targets.benchmark_case import SEARCH_SEEDS, BenchmarkCase, Run, Search, search_rate
from benchmarks.targets.results import (
    ADAPTDL,
    ADAPTIVE,
    RAMP,
    RULES_COMPARED,
    SMITH,
    Outcome,
    best_searched,
    far_starts,
    fixed_name,
    rule_name,
)
from benchmarks.targets.timed_run import Finish, Mark, Pair, TimedRun

_SMITH_STAGES = 4
_TURNS_PER_SEED = 3
_STEPS_OF_A_TURN = 80
_PATIENCE = 2
"""A run whose batch is not fixed is given up once it took that many times the seconds of the best fixed one."""

_T = TypeVar("_T")
Tell = Callable[[str], None]
"""Receives the progress of the work."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A competitor.

    Attributes:
        timed_run: (seed, samples that it goes on for at least) → timed run.
        learning_rate: of it, for the page.
    """

    timed_run: Callable[[int, float], TimedRun]
    learning_rate: float


def hold(case: BenchmarkCase, *, num_seeds: int, tell: Tell) -> Outcome:
    """Run a whole comparison on a pair of replicas.

    The searches have seeds of their own: no variant is judged by a run that chose its rate.
    """
    with Pair() as pair:
        run = reporting(pair.run, tell)
        run(case.fixed(case.batches[0], learning_rate=case.guess(case.batches[0]), seed=SEARCH_SEEDS[0], most_steps=50))
        swept = {batch: search_fixed(case, batch, run=run) for batch in case.batches}
        searches = {batch: found for batch, found in swept.items() if found.best is not None}
        best = best_searched(searches)
        starts = {ADAPTIVE: case.default_batch, **far_starts(best)}
        adaptive = search_adaptive(case, run=run)
        variants, absent = _variants(case, searches=searches, adaptive=adaptive, starts=starts, best=best)
        finishes: dict[str, dict[int, Finish]] = {name: {} for name in variants}
        for seed in range(1, num_seeds + 1):
            # The best fixed batch goes first: the adaptive run is to go as many samples far.
            names = sorted(variants, key=lambda name: name != fixed_name(best))
            for name in [names[0], *turned(names[1:], seed)]:
                end = finishes[fixed_name(best)].get(seed)
                least = end.end.samples if name == ADAPTIVE and end is not None and end.end is not None else 0.0
                tell(f"seed {seed}, {name}")
                timed_run = variants[name].timed_run(seed, least)
                if name not in map(fixed_name, searches):
                    timed_run = dataclasses.replace(timed_run, most_seconds=_PATIENCE * searches[best].end.seconds)
                finishes[name][seed] = run(timed_run)
        tell("the time of a step")
        step_s = _step_times(case, searches, num_turns=_TURNS_PER_SEED * num_seeds, run=pair.run)
    return Outcome(
        case=case,
        searches=searches,
        failed_searches={batch: found for batch, found in swept.items() if found.best is None},
        adaptive_search=adaptive,
        finishes=finishes,
        step_s=step_s,
        rates={name: variant.learning_rate for name, variant in variants.items()},
        absent=absent,
    )


def _step_times(
    case: BenchmarkCase, searches: Mapping[int, Search], *, num_turns: int, run: Run
) -> dict[tuple[int, int], float]:
    """Return the time of a step by (micro-batch, accumulation steps), the median over short turns of all batches.

    The timed runs keep one shape for minutes, and on a machine whose speed varies by tens of per cent each shape would
    be timed at another speed.
    """
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for turn in range(num_turns):
        for batch in turned(list(searches), turn):
            rate = searches[batch].rate
            finish = run(case.fixed(batch, learning_rate=rate, seed=turn, most_steps=_STEPS_OF_A_TURN))
            for shape, seconds in finish.step_s.items():
                times[shape].append(statistics.median(seconds))
    return {shape: statistics.median(seconds) for shape, seconds in times.items()}


def reporting(run: Run, tell: Tell) -> Run:
    """Return `run`, which tells how each timed run ended, too."""

    def running(timed_run: TimedRun) -> Finish:
        finish = run(timed_run)
        end = finish.end or finish.marks[-1]
        place = f"{end.steps:,.0f} steps, {end.samples:,.0f} samples, {end.seconds:.1f} s"
        optimizer = timed_run.settings["optimizer"]
        rate = f"rate {optimizer['learning_rate']:.3g} ({optimizer['rule']})"
        tell(f"  from {timed_run.settings['global_batch_size']}, {rate}: {finish.reason or place}")
        return finish

    return running


def search_fixed(case: BenchmarkCase, batch: int, *, run: Run) -> Search:
    """Search the rate of a fixed batch, by steps."""

    def run_at(rate: float, most_steps: float, seed: int) -> TimedRun:
        return case.fixed(batch, learning_rate=rate, seed=seed, most_steps=most_steps)

    return search_rate(run_at, start=case.guess(batch), run=run, cost=_steps)


def search_adaptive(case: BenchmarkCase, *, run: Run) -> Search:
    """Search the rate of the default law from the default batch, by seconds."""
    start = case.default_batch

    def run_at(rate: float, most_steps: float, seed: int) -> TimedRun:
        # Steps are no measure of an adaptive run: one at larger batches takes fewer.
        return case.adaptive(start, learning_rate=rate, seed=seed, most_steps=2 * most_steps)

    found = search_rate(run_at, start=case.guess(start), run=run, cost=_seconds)
    if found.best is None:
        raise RuntimeError(f"from a batch of {start} no learning rate leads to the target: choose another one")
    return found


def _steps(end: Mark) -> float:
    return end.steps


def _seconds(end: Mark) -> float:
    return end.seconds


def turned(names: Sequence[_T], seed: int) -> list[_T]:
    """Return the names, or batches, in an order that changes from seed to seed."""
    shift = seed * len(names) // 3 % max(len(names), 1)
    return [*names[shift:], *names[:shift]]


def _variants(
    case: BenchmarkCase,
    *,
    searches: Mapping[int, Search],
    adaptive: Search,
    starts: Mapping[str, int],
    best: int,
) -> tuple[dict[str, Variant], dict[str, str]]:
    rate = adaptive.rate
    variants = {fixed_name(batch): _fixed(case, batch, found.rate) for batch, found in searches.items()}
    variants |= {name: _adaptive(case, start, rate) for name, start in starts.items()}
    variants |= {rule_name(rule): _adaptive(case, case.default_batch, rate, rule=rule) for rule in RULES_COMPARED}
    expected = searches[best].end.samples
    variants[SMITH] = _scheduled(case, doublings(best, expected), searches[best].rate, rule="none")
    ramp = linear_ramp(case.default_batch, best, expected)
    variants[RAMP] = _scheduled(case, ramp, rate, rule="square_root")
    reason = adaptdl_policy.absent()
    if reason:
        return variants, {ADAPTDL: reason}
    variants[ADAPTDL] = Variant(
        timed_run=lambda seed, _: case.adaptdl(learning_rate=rate, seed=seed),
        learning_rate=rate,
    )
    return variants, {}


def _fixed(case: BenchmarkCase, batch: int, rate: float) -> Variant:
    return Variant(timed_run=lambda seed, _: case.fixed(batch, learning_rate=rate, seed=seed), learning_rate=rate)


def _adaptive(case: BenchmarkCase, start: int, rate: float, *, rule: str | None = None) -> Variant:
    return Variant(
        timed_run=lambda seed, least: case.adaptive(
            start, learning_rate=rate, seed=seed, rule=rule, least_samples=least
        ),
        learning_rate=rate,
    )


def _scheduled(case: BenchmarkCase, stages: Sequence[tuple[int, int]], rate: float, *, rule: str) -> Variant:
    return Variant(
        timed_run=lambda seed, _: case.scheduled(stages, learning_rate=rate, seed=seed, rule=rule), learning_rate=rate
    )


def doublings(best: int, expected: float) -> list[tuple[int, int]]:
    """Return a batch that begins at half of the best fixed one and doubles at equal distances, at a rate that stays."""
    return [(round(number * expected / _SMITH_STAGES), best * 2**number // 2) for number in range(_SMITH_STAGES)]


def linear_ramp(first: int, best: int, expected: float) -> list[tuple[int, int]]:
    """Return a batch that grows in a line, from the default one to twice the best over the expected samples."""
    steps = max(2, min(32, (2 * best - first) // 2))
    return [
        (math.floor(number * expected / steps), first + 2 * round(number * (2 * best - first) / (steps - 1) / 2))
        for number in range(steps)
    ]
