"""Runs a contest from the searches to the last seed, arms in turn so that a slow spell of the machine hits them all."""

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
from benchmarks.targets.timed_run import Finish, Mark, Pair, Race

_SMITH_STAGES = 4
_TURNS_PER_SEED = 3
_STEPS_OF_A_TURN = 80
_PATIENCE = 2
"""A run whose batch is not fixed is given up once it took that many times the seconds of the best fixed one."""

_T = TypeVar("_T")
Tell = Callable[[str], None]
"""Is told how far the work is."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A competitor.

    Attributes:
        race: (seed, samples that it goes on for at least) → race.
        learning_rate: of it, for the page.
    """

    race: Callable[[int, float], Race]
    learning_rate: float


def hold(case: BenchmarkCase, *, num_seeds: int, tell: Tell) -> Outcome:
    """Run a whole contest on a pair of replicas.

    The searches have seeds of their own: no arm is judged by a run that chose its rate.
    """
    with Pair() as pair:
        run = told(pair.run, tell)
        run(case.fixed(case.batches[0], learning_rate=case.guess(case.batches[0]), seed=SEARCH_SEEDS[0], most_steps=50))
        swept = {batch: search_fixed(case, batch, run=run) for batch in case.batches}
        searches = {batch: found for batch, found in swept.items() if found.best is not None}
        best = best_searched(searches)
        starts = {ADAPTIVE: case.default_batch, **far_starts(best)}
        adaptive = search_adaptive(case, run=run)
        arms, absent = _arms(case, searches=searches, adaptive=adaptive, starts=starts, best=best)
        finishes: dict[str, dict[int, Finish]] = {name: {} for name in arms}
        for seed in range(1, num_seeds + 1):
            # The best fixed batch goes first: the adaptive run is to go as many samples far.
            names = sorted(arms, key=lambda name: name != fixed_name(best))
            for name in [names[0], *_turned(names[1:], seed)]:
                end = finishes[fixed_name(best)].get(seed)
                least = end.end.samples if name == ADAPTIVE and end is not None and end.end is not None else 0.0
                tell(f"seed {seed}, {name}")
                race = arms[name].race(seed, least)
                if name not in map(fixed_name, searches):
                    race = dataclasses.replace(race, most_seconds=_PATIENCE * searches[best].end.seconds)
                finishes[name][seed] = run(race)
        tell("the time of a step")
        step_s = _step_times(case, searches, num_turns=_TURNS_PER_SEED * num_seeds, run=pair.run)
    return Outcome(
        case=case,
        searches=searches,
        searches_in_vain={batch: found for batch, found in swept.items() if found.best is None},
        adaptive_search=adaptive,
        finishes=finishes,
        step_s=step_s,
        rates={name: arm.learning_rate for name, arm in arms.items()},
        absent=absent,
    )


def _step_times(
    case: BenchmarkCase, searches: Mapping[int, Search], *, num_turns: int, run: Run
) -> dict[tuple[int, int], float]:
    """Return the time of a step by (micro-batch, accumulation steps), the median over short turns of all batches.

    In the races a shape is run for minutes on end, and on a machine whose speed wanders by tens of per cent each of
    them would be timed at another speed.
    """
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for turn in range(num_turns):
        for batch in _turned(list(searches), turn):
            rate = searches[batch].rate
            finish = run(case.fixed(batch, learning_rate=rate, seed=turn, most_steps=_STEPS_OF_A_TURN))
            for shape, seconds in finish.step_s.items():
                times[shape].append(statistics.median(seconds))
    return {shape: statistics.median(seconds) for shape, seconds in times.items()}


def told(run: Run, tell: Tell) -> Run:
    """Return `run`, which tells how each race ended, too."""

    def running(race: Race) -> Finish:
        finish = run(race)
        end = finish.end or finish.marks[-1]
        place = f"{end.steps:,.0f} steps, {end.samples:,.0f} samples, {end.seconds:.1f} s"
        optimizer = race.settings["optimizer"]
        rate = f"rate {optimizer['learning_rate']:.3g} ({optimizer['rule']})"
        tell(f"  from {race.settings['global_batch_size']}, {rate}: {finish.reason or place}")
        return finish

    return running


def search_fixed(case: BenchmarkCase, batch: int, *, run: Run) -> Search:
    """Search the rate of a fixed batch, by steps."""

    def race_at(rate: float, most_steps: float, seed: int) -> Race:
        return case.fixed(batch, learning_rate=rate, seed=seed, most_steps=most_steps)

    return search_rate(race_at, start=case.guess(batch), run=run, cost=_steps)


def search_adaptive(case: BenchmarkCase, *, run: Run) -> Search:
    """Search the rate of the default law from the default batch, by seconds."""
    start = case.default_batch

    def race_at(rate: float, most_steps: float, seed: int) -> Race:
        # Steps are no measure of an adaptive run: one at larger batches takes fewer.
        return case.adaptive(start, learning_rate=rate, seed=seed, most_steps=2 * most_steps)

    found = search_rate(race_at, start=case.guess(start), run=run, cost=_seconds)
    if found.best is None:
        raise RuntimeError(f"from a batch of {start} no learning rate leads to the target: choose another one")
    return found


def _steps(end: Mark) -> float:
    return end.steps


def _seconds(end: Mark) -> float:
    return end.seconds


def _turned(names: Sequence[_T], seed: int) -> list[_T]:
    """Return the names, or batches, in an order that changes from seed to seed."""
    shift = seed * len(names) // 3 % max(len(names), 1)
    return [*names[shift:], *names[:shift]]


def _arms(
    case: BenchmarkCase,
    *,
    searches: Mapping[int, Search],
    adaptive: Search,
    starts: Mapping[str, int],
    best: int,
) -> tuple[dict[str, Arm], dict[str, str]]:
    rate = adaptive.rate
    arms = {fixed_name(batch): _fixed(case, batch, found.rate) for batch, found in searches.items()}
    arms |= {name: _adaptive(case, start, rate) for name, start in starts.items()}
    arms |= {rule_name(rule): _adaptive(case, case.default_batch, rate, rule=rule) for rule in RULES_COMPARED}
    expected = searches[best].end.samples
    arms[SMITH] = _scheduled(case, doublings(best, expected), searches[best].rate, rule="none")
    ramp = linear_ramp(case.default_batch, best, expected)
    arms[RAMP] = _scheduled(case, ramp, rate, rule="square_root")
    reason = adaptdl_policy.absent()
    if reason:
        return arms, {ADAPTDL: reason}
    arms[ADAPTDL] = Arm(
        race=lambda seed, _: case.adaptdl(learning_rate=rate, seed=seed),
        learning_rate=rate,
    )
    return arms, {}


def _fixed(case: BenchmarkCase, batch: int, rate: float) -> Arm:
    return Arm(race=lambda seed, _: case.fixed(batch, learning_rate=rate, seed=seed), learning_rate=rate)


def _adaptive(case: BenchmarkCase, start: int, rate: float, *, rule: str | None = None) -> Arm:
    return Arm(
        race=lambda seed, least: case.adaptive(start, learning_rate=rate, seed=seed, rule=rule, least_samples=least),
        learning_rate=rate,
    )


def _scheduled(case: BenchmarkCase, stages: Sequence[tuple[int, int]], rate: float, *, rule: str) -> Arm:
    return Arm(
        race=lambda seed, _: case.scheduled(stages, learning_rate=rate, seed=seed, rule=rule), learning_rate=rate
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
