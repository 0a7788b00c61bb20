"""What competes on a task: timed runs with their settings, and the search for a learning rate; judges nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.targets.timed_run import Finish, Mark, TimedRun

Run = Callable[[TimedRun], Finish]
"""Runs a timed run."""

_FEWEST_RATES = 4
_MOST_FAILED = 6
_STEPS_BETWEEN_EVALUATIONS = 4
_PATIENCE = 1.25
"""A run is given up once it took that many times the steps of the best one of its search, with a further seed twice as
many, since seeds scatter."""
SEARCH_SEEDS = (0, 1000, 2000)
"""Of all searches, on the best rate and its neighbours: no variant is judged by the runs that chose its rate."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkCase:
    """A task, a target, and the range that all variants may use.

    Attributes:
        task: as `TrainConfig` names it.
        target: held-out loss.
        batches: that are swept, powers of two.
        default_batch: that the task suggests, where the adaptive run starts.
        micro_batch_size: largest on one replica.
        learning_rate: where the search begins, at `rate_batch`; elsewhere by the square root of the batch.
        rate_batch: as said.
        warmup_samples: of the learning rate, which is constant after it.
        eval_every_samples: between evaluations; fixed batches have four steps between them at least.
        most_steps: after which any run is given up.
        optimizer: its settings but the rate.
    """

    task: str
    target: float
    batches: Sequence[int]
    default_batch: int
    micro_batch_size: int
    learning_rate: float
    rate_batch: int
    warmup_samples: int
    eval_every_samples: int
    most_steps: int
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    def timed_run(
        self,
        *,
        batch: int,
        learning_rate: float,
        seed: int,
        control: Mapping[str, Any],
        rule: str | None = None,
        policy: str = "dptrain",
        most_steps: float = math.inf,
        most_seconds: float = math.inf,
        least_samples: float = 0.0,
        reference_batch: int | None = None,
        eval_every_samples: int | None = None,
    ) -> TimedRun:
        """Return a timed run that begins at a batch, with a learning rate for that batch or for `reference_batch`."""
        optimizer = {
            "schedule": "constant",
            "warmup_samples": self.warmup_samples,
            **self.optimizer,
            "rule": rule,
            "learning_rate": learning_rate,
            "reference_batch_size": reference_batch,
        }
        settings = {
            "task": self.task,
            "seed": seed,
            "global_batch_size": batch,
            "micro_batch_size": self.micro_batch_size,
            "control": dict(control),
            "optimizer": optimizer,
            "log": {"eval_every_samples": eval_every_samples or self.eval_every_samples},
        }
        return TimedRun(
            settings=settings,
            target=self.target,
            most_steps=min(most_steps, self.most_steps),
            most_seconds=most_seconds,
            least_samples=least_samples,
            policy=policy,
        )

    def fixed(self, batch: int, **more: Any) -> TimedRun:  # noqa: ANN401 - handed on
        """Return a plain run: nothing is measured."""
        every = max(self.eval_every_samples, _STEPS_BETWEEN_EVALUATIONS * batch)
        return self.timed_run(batch=batch, control={"mode": "off", "law": "constant"}, eval_every_samples=every, **more)

    def adaptive(self, batch: int, **more: Any) -> TimedRun:  # noqa: ANN401 - handed on
        """Return a run with dptrain's default law, free to use all batches of the sweep and the one it begins at.

        Its learning rate is one for the task's default batch, wherever it begins.
        """
        bounds = {"smallest": min(self.batches[0], batch), "largest": max(self.batches[-1], batch)}
        return self.timed_run(batch=batch, control=bounds, reference_batch=self.default_batch, **more)

    def scheduled(self, stages: Sequence[tuple[int, int]], **more: Any) -> TimedRun:  # noqa: ANN401 - handed on
        """Return a run whose batches are written down beforehand, as (first sample, batch)."""
        text = " ".join(f"{start}:{batch}" for start, batch in stages)
        control = {"mode": "adapt", "law": "schedule", "schedule": text}
        return self.timed_run(batch=stages[0][1], control=control, **more)

    def adaptdl(self, **more: Any) -> TimedRun:  # noqa: ANN401 - handed on
        """Return a run in which AdaptDL decides, from the default batch upwards, as it does."""
        control = {"mode": "off", "law": "constant", "largest": self.batches[-1]}
        return self.timed_run(batch=self.default_batch, control=control, policy="adaptdl", **more)

    def guess(self, batch: int) -> float:
        """Return the learning rate at which the search begins for a batch, a power of two times `learning_rate`."""
        return self.learning_rate * 2.0 ** round(0.5 * math.log2(batch / self.rate_batch))


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search for the learning rate of a variant.

    Attributes:
        best: the rate that was best; None where none reached the target.
        finishes: of each rate that was tried.
        seconds_of_further_seeds: spent on the best rate and its neighbours.
    """

    best: float | None
    finishes: Mapping[float, Finish]
    seconds_of_further_seeds: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of training in all of it, runs that were given up included."""
        return sum(map(_seconds, self.finishes.values())) + self.seconds_of_further_seeds

    @property
    def end(self) -> Mark:
        """Where the best rate arrived."""
        end = self.finishes[self.rate].end
        assert end is not None, "the best rate is one that arrived"
        return end

    @property
    def rate(self) -> float:
        """The best rate of a search that succeeded."""
        assert self.best is not None
        return self.best


def search_rate(
    make_run: Callable[[float, float, int], TimedRun], *, start: float, run: Run, cost: Callable[[Mark], float]
) -> Search:
    """Find the learning rate of least cost to the target, on a grid of factors of two that widens at its edge.

    At least four rates are tried, and the best one has a worse one on both sides. Those of the three that arrived are
    run with further seeds, and the one whose slowest seed costs least is taken: a rate on the brink of failing is as
    fast as any with most seeds, so that neither one run nor a mean tells it from a good one.

    Args:
        make_run: (rate, steps after which to give up, seed) → timed run.
        start: the first rate.
        run: runs it.
        cost: of an arrival.

    Returns:
        What was found.
    """
    finishes: dict[int, Finish] = {}
    costs: dict[int, float] = {}

    def run_at(at: int, seed: int) -> tuple[Finish, float]:
        ends = [finish.end.steps for finish in finishes.values() if finish.end is not None]
        patience = _PATIENCE if seed == SEARCH_SEEDS[0] else 2 * _PATIENCE
        finish = run(make_run(start * 2.0**at, patience * min(ends, default=math.inf), seed))
        return finish, math.inf if finish.end is None else cost(finish.end)

    while (at := _next_rate(costs)) is not None:
        finishes[at], costs[at] = run_at(at, SEARCH_SEEDS[0])
    best, seconds = _cheapest(costs), 0.0
    tried = {start * 2.0**at: finish for at, finish in finishes.items()}
    if costs[best] == math.inf:
        return Search(best=None, finishes=tried)
    slowest = {at: costs[at] for at in (best - 1, best, best + 1) if costs[at] < math.inf}
    for seed in SEARCH_SEEDS[1:] if len(slowest) > 1 else ():
        for at in [at for at, most in slowest.items() if most < math.inf]:
            finish, again = run_at(at, seed)
            seconds, slowest[at] = seconds + _seconds(finish), max(slowest[at], again)
    best = best if min(slowest.values()) == math.inf else _cheapest(slowest)
    return Search(best=start * 2.0**best, finishes=tried, seconds_of_further_seeds=seconds)


def _next_rate(costs: Mapping[int, float]) -> int | None:
    """Return the place on the grid to try next; None where the search is over."""
    if not costs:
        return 0
    best = _cheapest(costs)
    if costs[best] == math.inf:
        # Alternately above and below: a rate that never arrives may be too small as well as too large.
        return (len(costs) + 1) // 2 * (1 if len(costs) % 2 else -1) if len(costs) < _MOST_FAILED else None
    for at in (best + 1, best - 1):
        if at not in costs:
            return at
    if len(costs) >= _FEWEST_RATES:
        return None
    low, high = min(costs), max(costs)
    return low - 1 if costs[low] <= costs[high] else high + 1


def _seconds(finish: Finish) -> float:
    return finish.marks[-1].seconds if finish.marks else 0.0


def _cheapest(costs: Mapping[int, float]) -> int:
    return min(costs, key=lambda at: (costs[at], abs(at)))


def benchmark_cases(*, quick: bool) -> Mapping[str, BenchmarkCase]:
    """Return the case of each task."""
    here = Path(__file__).with_name("small_tasks.py")
    digits = BenchmarkCase(
        task=f"{here}:deep_digits",
        target=0.03 if quick else 0.0116,
        batches=[2**k for k in range(4, 12)],
        default_batch=16,
        micro_batch_size=256,
        learning_rate=0.002,
        rate_batch=128,
        warmup_samples=2_000,
        eval_every_samples=2_048,
        most_steps=6_000,
        optimizer={"weight_decay": 0.0},
    )
    pysource = BenchmarkCase(
        task=f"{here}:small_pysource",
        target=2.3 if quick else 2.05,
        batches=[2**k for k in range(3, 11)],
        default_batch=16,
        micro_batch_size=256,
        learning_rate=0.004,
        rate_batch=64,
        warmup_samples=4_000,
        eval_every_samples=2_000,
        most_steps=6_000,
    )
    return {"digits": digits, "pysource": pysource}
