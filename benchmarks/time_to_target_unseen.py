"""Does the default reach a target as soon as the best fixed batch, on tasks and step times that it was not tuned on?"""
# python -m benchmarks.time_to_target_unseen [--tasks NAME,…] [--regimes NAME,…] [--seeds N] [--json PATH|-]

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from benchmarks import harness
from benchmarks.targets.benchmark_case import BenchmarkCase, Run, Search, benchmark_cases
from benchmarks.targets.comparison import doublings, linear_ramp, reporting, search_adaptive, search_fixed, turned
from benchmarks.targets.results import ADAPTIVE, RAMP, SMITH, far_starts, fixed_name
from benchmarks.targets.timed_run import Finish, Mark, Pair, StepDelay, TimedRun

REGIMES = {
    "plain": StepDelay(),
    "step-30ms": StepDelay(per_step_s=0.03),
    "step-300ms": StepDelay(per_step_s=0.3),
    "not-full": StepDelay(per_step_s=0.002, per_sample_s=0.0005, full_at_samples=64),
}
"""Sleep added to each step: none, a slow network twice, and a device that takes 32 ms for up to 64 samples."""
SLOW = ("step-30ms", "step-300ms", "not-full")
HELD_BACK = ("mnist1d_cnn", "gpt_bytes", "policy_gradient")
"""Tasks that were looked at once, at the end; the others are for development."""
_TIMED_STEPS = 30
_PATIENCE = 3.0
_LEVEL = 0.95


def cases(*, quick: bool) -> dict[str, BenchmarkCase]:
    """Return all tasks by name, those of `time_to_target` among them."""
    here = Path(__file__).parent / "targets" / "new_tasks.py"

    def case(name: str, **settings: Any) -> BenchmarkCase:  # noqa: ANN401 - handed on
        return BenchmarkCase(
            task=f"{here}:{name}",
            **{"default_batch": 16, "micro_batch_size": 256, "rate_batch": 64, "most_steps": 8_000, **settings},
        )

    powers = [2**k for k in range(3, 11)]
    found = dict(benchmark_cases(quick=quick))
    for name, target, rate, every in (
        ("lstm_bytes", 2.1, 0.004, 2_048),
        ("mnist1d_mlp", 1.0, 0.004, 2_048),
        ("mnist1d_cnn", 0.5, 0.004, 2_048),
        ("denoiser", 0.362, 0.002, 2_048),
        ("gpt_bytes", 2.2, 0.001, 1_024),
        ("policy_gradient", 0.04, 0.004, 2_048),
    ):
        found[name] = case(
            name, target=target, batches=powers, learning_rate=rate, warmup_samples=2_000, eval_every_samples=every
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One task under one regime.

    Attributes:
        seconds: to the target, by variant and seed; infinite where it was not reached.
        best: the variant of the fixed batch with the fewest seconds in the median.
        default: the variant of the task's default batch, held fixed.
    """

    seconds: Mapping[str, Mapping[int, float]]
    best: str
    default: str

    def ratios(self, variant: str, *, over: str) -> list[float]:
        """Return a variant's seconds to those of another with the same seed."""
        found = self.seconds[variant]
        return [found[seed] / base for seed, base in self.seconds[over].items() if math.isfinite(base)]


def interval(ratios: Sequence[float], *, level: float = _LEVEL) -> tuple[float, float]:
    """Return the interval of the geometric mean of paired ratios by Student's t; open where a run did not arrive."""
    if len(ratios) < 2 or not all(map(math.isfinite, ratios)):
        return 0.0, math.inf
    logs = [math.log(ratio) for ratio in ratios]
    middle, spread = statistics.mean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    half = float(stats.t.ppf((1 + level) / 2, len(logs) - 1)) * spread
    return math.exp(middle - half), math.exp(middle + half)


def compare(
    case: BenchmarkCase,
    delay: StepDelay,
    *,
    searches: Mapping[int, Search],
    rate: float,
    seeds: Sequence[int],
    run: Run,
) -> Comparison:
    """Run all variants with each seed.

    A fixed batch does not react to time: under a delay it is run without it for its steps, and with it for 30 steps
    that are timed. Adaptive and scheduled variants sleep in each of their steps.

    Args:
        case: the task.
        delay: the regime.
        searches: of the fixed batches' rates, those that arrived.
        rate: of the adaptive variants, for the default batch.
        seeds: of the runs.
        run: runs a timed run.
    """
    is_delayed = delay != StepDelay()
    step_s = {
        batch: _step_s(case, batch, search.rate, delay=delay, run=run) if is_delayed else None
        for batch, search in searches.items()
    }

    def seconds_of(batch: int, end: Mark | None) -> float:
        each_s = step_s[batch]
        return math.inf if end is None else end.seconds if each_s is None else end.steps * each_s

    searched = {batch: seconds_of(batch, search.end) for batch, search in searches.items()}
    best = min(searched, key=searched.__getitem__)
    fixed = {fixed_name(batch): batch for batch in searches}
    moving = dict(_moving(case, searches=searches, best=best, rate=rate))
    seconds: dict[str, dict[int, float]] = {name: {} for name in [*fixed, *moving]}
    for seed in seeds:
        # All variants of a seed in one spell of the machine, and each at another place with each seed.
        for name in turned(list(seconds), seed):
            if name in fixed:
                end = run(case.fixed(fixed[name], learning_rate=searches[fixed[name]].rate, seed=seed)).end
                seconds[name][seed] = seconds_of(fixed[name], end)
            else:
                slowed = dataclasses.replace(moving[name](seed), delay=delay, most_seconds=_PATIENCE * searched[best])
                end = run(slowed).end
                seconds[name][seed] = math.inf if end is None else end.seconds
    fastest = min(searches, key=lambda batch: statistics.median(seconds[fixed_name(batch)].values()))
    return Comparison(seconds=seconds, best=fixed_name(fastest), default=fixed_name(case.default_batch))


def _step_s(case: BenchmarkCase, batch: int, rate: float, *, delay: StepDelay, run: Run) -> float:
    timed_run = case.timed_run(
        batch=batch,
        learning_rate=rate,
        seed=0,
        control={"mode": "off", "law": "constant"},
        most_steps=_TIMED_STEPS,
        eval_every_samples=_TIMED_STEPS * batch,
    )
    finish: Finish = run(dataclasses.replace(timed_run, delay=delay, target=-math.inf))
    return statistics.median(value for values in finish.step_s.values() for value in values)


def _moving(
    case: BenchmarkCase, *, searches: Mapping[int, Search], best: int, rate: float
) -> Iterator[tuple[str, Callable[[int], TimedRun]]]:
    """Yield the variants whose batch is not fixed."""
    starts = {ADAPTIVE: case.default_batch, **far_starts(best)}
    for name, start in starts.items():
        yield name, lambda seed, start=start: case.adaptive(start, learning_rate=rate, seed=seed)  # type: ignore[misc]
    expected, fixed_rate = searches[best].end.samples, searches[best].rate
    smith, ramp = doublings(best, expected), linear_ramp(case.default_batch, best, expected)
    yield SMITH, lambda seed: case.scheduled(smith, learning_rate=fixed_rate, seed=seed, rule="none")
    yield RAMP, lambda seed: case.scheduled(ramp, learning_rate=rate, seed=seed, rule="square_root")


def measure(
    named: Mapping[str, BenchmarkCase], *, regimes: Sequence[str], num_seeds: int, tell: Callable[[str], None]
) -> harness.Findings:
    """Search the rates of each task once, without delay, and compare all variants under each regime."""
    found: dict[tuple[str, str], Comparison] = {}
    with Pair() as pair:
        run = reporting(pair.run, tell)
        for name, case in named.items():
            swept = {batch: search_fixed(case, batch, run=run) for batch in case.batches}
            searches = {batch: search for batch, search in swept.items() if search.best is not None}
            rate = search_adaptive(case, run=run).rate
            for regime in regimes:
                tell(f"{name}, {regime}")
                found[name, regime] = compare(
                    case, REGIMES[regime], searches=searches, rate=rate, seeds=range(1, num_seeds + 1), run=run
                )
    return findings(found)


def findings(found: Mapping[tuple[str, str], Comparison]) -> harness.Findings:
    """Return a row for each variant, and the figures over tasks and regimes."""
    rows = [
        _row(task, regime, variant, compared)
        for (task, regime), compared in found.items()
        for variant in compared.seconds
    ]
    unseen = [
        statistics.median(compared.ratios(ADAPTIVE, over=compared.best))
        for (task, regime), compared in found.items()
        if task in HELD_BACK and regime == "plain"
    ]
    slow = [compared for (_, regime), compared in found.items() if regime in SLOW]
    figures = {
        "unseen_median": statistics.median(unseen) if unseen else math.inf,
        "unseen_max": max(unseen, default=math.inf),
        "slow_over_best_fixed": _largest(slow, lambda compared: compared.best),
        "slow_over_default_fixed": _largest(slow, lambda compared: compared.default),
    }
    return harness.Findings(
        figures={name: value for name, value in figures.items() if math.isfinite(value)},
        rows=rows,
        columns={
            "task": "{task}",
            "regime": "{regime}",
            "variant": "{variant}",
            "seconds": "{shown_seconds}",
            f"to best fixed, median [{_LEVEL:.0%}]": "{shown_ratio}",
        },
        note="Ratios are paired by seed, with the interval of their geometric mean. Rates were searched without delay.",
    )


def _largest(found: Sequence[Comparison], over: Callable[[Comparison], str]) -> float:
    known = [compared for compared in found if over(compared) in compared.seconds]
    ratios = [compared.ratios(ADAPTIVE, over=over(compared)) for compared in known]
    return max((statistics.median(each) for each in ratios if each), default=math.inf)


def _row(task: str, regime: str, variant: str, compared: Comparison) -> dict[str, Any]:
    seconds, ratios = list(compared.seconds[variant].values()), compared.ratios(variant, over=compared.best)
    middle = statistics.median(ratios) if ratios else math.inf
    low, high = interval(ratios)
    arrived = [value for value in seconds if math.isfinite(value)]
    shown = f"{middle:.2f}" if math.isfinite(middle) else "not at the target"
    if math.isfinite(high):
        shown = f"{shown} [{low:.2f}, {high:.2f}]"
    return {
        "task": task,
        "regime": regime,
        "variant": variant,
        "is_best_fixed": variant == compared.best,
        "seconds": [value if math.isfinite(value) else None for value in seconds],
        "ratios": [value if math.isfinite(value) else None for value in ratios],
        "interval": [low, high] if math.isfinite(high) else None,
        "shown_seconds": f"{statistics.median(arrived):,.3g}" if arrived else "",
        "shown_ratio": shown,
    }


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="time_to_target_unseen")
    known = cases(quick=False)
    parser.add_argument("--tasks", type=_names(known), default=list(known), help="of " + ", ".join(known))
    parser.add_argument("--regimes", type=_names(REGIMES), default=list(REGIMES), help="of " + ", ".join(REGIMES))
    parser.add_argument("--seeds", type=int, default=None, help="of each variant (3; quick 1)")
    options = parser.parse_args()
    chosen = cases(quick=options.quick)
    if options.quick:
        chosen = {name: dataclasses.replace(case, batches=case.batches[1:6:2]) for name, case in chosen.items()}
    found = measure(
        {name: chosen[name] for name in options.tasks},
        regimes=options.regimes,
        num_seeds=options.seeds or (1 if options.quick else 3),
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    name = f"time_to_target_unseen --tasks {','.join(options.tasks)} --regimes {','.join(options.regimes)}"
    harness.tell(found, options, question=__doc__, name=name, device="cpu")


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}: there are {', '.join(known)}")
        return names

    return read


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
