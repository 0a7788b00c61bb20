"""The quick form of `benchmarks.time_to_target` on problems whose answer is known, and how a comparison is judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.targets import comparison, page, results
from benchmarks.targets.benchmark_case import Search, benchmark_cases, search_rate
from benchmarks.targets.quadratics import DAMPED, SampledDamped, drive, first_batch, law_of, timed
from benchmarks.targets.results import ADAPTDL, ADAPTIVE, Outcome, fixed_name
from benchmarks.targets.timed_run import Finish, Mark

ROOT = Path(__file__).parents[2]
STEPS = {64: 3_000.0, 128: 2_000.0, 256: 1_500.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command = ["-m", "benchmarks.time_to_target", "--task", "quadratic", "--quick", "--results", str(folder)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def figures(found):
    return json.loads((found / "time_to_target_quadratic.json").read_text())["figures"]


def test_fixed_batches_lie_on_the_hyperbola(figures):
    """At least eight sizes of the damped problem, driven by the real controller, are within 5 % of it."""
    assert figures["num_fixed"] >= 8
    assert figures["frontier_product"] == pytest.approx(1, rel=0.05)


def test_the_real_law_reaches_the_predicted_saving(figures):
    """Within 5 % of γ when it is given the noise scale, within 10 % when it has to measure it."""
    assert figures["gamma_predicted"] == pytest.approx(0.7107, abs=1e-4)
    assert figures["gamma_exact"] == pytest.approx(figures["gamma_predicted"], rel=0.05)
    assert figures["gamma_measured"] == pytest.approx(figures["gamma_predicted"], rel=0.1)


def test_adapting_beats_every_fixed_batch_on_the_noisy_quadratic(figures):
    """At the steps that the adaptive run takes, the fixed batch of as many needs more samples."""
    assert 0.5 < figures["noisy_quadratic_over_curve"] < 1


def test_page_and_picture_are_written(found):
    """The page has the figures and names its picture, which is there."""
    text = (found / "time_to_target_quadratic.md").read_text()
    assert "`gamma_measured`" in text
    assert "BROKEN" not in text
    assert "time_to_target_quadratic.png" in text
    assert (found / "time_to_target_quadratic.png").stat().st_size > 10_000


def test_the_goodput_law_finds_the_exchange_rate_in_the_times_of_steps():
    """With steps of r + B seconds it takes what the exchange-rate law takes that is given r."""
    spent = [
        drive(SampledDamped(dimension=50), law_of(107, goodput=goodput), start=first_batch(107), step_time=timed(107))
        for goodput in (False, True)
    ]
    assert spent[1].product(DAMPED) == pytest.approx(spent[0].product(DAMPED), rel=0.02)


@pytest.mark.parametrize(("best", "tried"), [(1.0, [0, 1, -1, -2]), (4.0, [0, 1, 2, 3]), (0.25, [0, 1, -1, -2, -3])])
def test_a_search_widens_until_the_best_rate_is_inside(best, tried):
    """Four rates at least, and a worse one on both sides of the best."""
    asked = []

    def run_at(rate, most_steps, seed):
        if seed == 0:
            asked.append((rate, most_steps))
        return rate

    def run(rate):
        return arrived(100 * (1 + abs(math.log2(rate / best))))

    search = search_rate(run_at, start=1.0, run=run, cost=lambda end: end.steps)
    assert search.best == best
    assert sorted(math.log2(rate) for rate, _ in asked) == sorted(tried)
    assert asked[0][1] == math.inf
    assert asked[-1][1] == 125  # of the best so far


@pytest.mark.parametrize(
    ("further", "best"),
    [
        ({0.5: 200, 1.0: 109, 2.0: 100}, 1.0),  # 2.0 has the better mean, and 119 as its slowest
        ({0.5: 200, 1.0: 150, 2.0: 100}, 2.0),
        ({0.5: 145, 1.0: 151, 2.0: 160}, 0.5),
        ({0.5: 145, 2.0: 160}, 0.5),  # the best one fails with another seed
        ({}, 1.0),
    ],
)
def test_the_slowest_seed_decides_between_the_best_rate_and_its_neighbours(further, best):
    """The further runs are paid for, and none goes to a rate that has failed already."""
    first, asked = {0.25: 300, 0.5: 150, 1.0: 100, 2.0: 119, 4.0: None}, []

    def run(timed_run):
        rate, _, seed = timed_run
        asked.append((rate, seed))
        steps = first[rate] if seed == 0 else further.get(rate)
        mark = Mark(steps=steps or 125, samples=1.0, seconds=1.0, loss=1.0)
        return Finish(end=mark if steps else None, reason="", marks=[mark], rows=[], step_s={})

    search = search_rate(lambda *timed_run: timed_run, start=1.0, run=run, cost=lambda end: end.steps)
    assert search.best == best
    again = [rate for rate, seed in asked if seed]
    assert again == [0.5, 1.0, 2.0, *[rate for rate in (0.5, 1.0, 2.0) if rate in further]]
    assert search.seconds == len(asked)


def test_a_rate_whose_neighbours_fail_is_not_run_again():
    """There is nothing to decide."""
    asked = []

    def run(timed_run):
        rate, _, seed = timed_run
        asked.append(seed)
        mark = Mark(steps=100, samples=1.0, seconds=1.0, loss=1.0)
        return Finish(end=mark if rate == 1.0 else None, reason="", marks=[mark], rows=[], step_s={})

    assert search_rate(lambda *timed_run: timed_run, start=1.0, run=run, cost=lambda end: end.steps).best == 1.0
    assert set(asked) == {0}


def test_a_search_without_success_ends():
    """Rates that never arrive are given up after a few, on both sides of the first."""
    asked = []
    lost = Finish(end=None, reason="lost", marks=[], rows=[], step_s={})
    search = search_rate(lambda rate, *_: asked.append(rate), start=1.0, run=lambda _: lost, cost=float)
    assert search.best is None
    assert asked == [1.0, 2.0, 0.5, 4.0, 0.25, 8.0]


def test_what_is_best_is_judged_seed_by_seed():
    """The best fixed batch has the fewest seconds; ratios are medians of those of equal seeds; the search counts."""
    outcome = make_outcome(adaptive=0.9)
    figures = results.figures(outcome)
    assert outcome.best == 128
    assert figures["adaptive_over_best_fixed"] == pytest.approx(0.9)
    assert figures["steps_ratio"] == pytest.approx(0.9)
    fixed, adaptive = 2.0, 2.0 * 0.9
    searched = sum(STEPS[batch] / 1000 * (1 if batch == 128 else 2) for batch in STEPS)
    failed = outcome.failed_searches[16].seconds
    assert failed > 0
    for name, seconds in (("search_cost_ratio", searched + failed), ("search_cost_ratio_without_failed", searched)):
        assert figures[name] == pytest.approx((seconds + fixed) / (1.0 + adaptive), rel=0.05)
    assert "10% fewer seconds than the best fixed batch (128)" in page.note(outcome, figures)


def test_steps_are_timed_in_turns():
    """A slow spell of the machine is shorter than the turns of all batches together, and does not count."""
    outcome, asked = make_outcome(adaptive=0.9), []

    def run(timed_run):
        batch = timed_run.settings["global_batch_size"]
        asked.append(batch)
        slowness = 3.0 if 4 <= len(asked) < 7 else 1.0
        seconds = slowness * (0.001 + 1e-5 * batch)
        return Finish(end=None, reason="", marks=[], rows=[], step_s={(batch // 2, 1): [seconds, seconds, 9.0]})

    step_s = comparison._step_times(outcome.case, outcome.searches, num_turns=6, run=run)
    assert step_s == pytest.approx(outcome.step_s)
    assert asked[:3] != asked[3:6]
    assert set(asked[:3]) == set(asked[3:6]) == set(STEPS)
    assert results.figures(replace(outcome, step_s=step_s))["step_time_error"] < 0.01


def test_adaptdl_that_was_given_up_counts_up_to_there():
    """Its seconds until then are the least that it would have needed: the ratio to them is the most that it can be."""
    outcome = make_outcome(adaptive=0.9)
    assert "adaptdl_ratio" not in results.figures(outcome)
    given_up = {seed: replace(arrived(1_000, seconds=4.5), end=None) for seed in (1, 2)}
    finishes, rates = {**outcome.finishes, ADAPTDL: given_up}, {**outcome.rates, ADAPTDL: 0.1}
    outcome = replace(outcome, finishes=finishes, rates=rates, absent={})
    figures = results.figures(outcome)
    assert figures["adaptdl_ratio"] == pytest.approx(2.0 * 0.9 / 4.5)
    text = page.of_comparison(outcome, figures, task="digits")
    assert "needs 0.40 times its seconds, counted until it was given up where it did not arrive (2 seeds)" in text


def test_the_loss_at_equal_samples_leaves_no_seed_out():
    """A run that arrived with fewer samples counts by its last loss, and one that was given up before as lost."""
    outcome = make_outcome(adaptive=0.9)
    fixed = outcome.finishes[fixed_name(128)]
    outcome, adaptive = replace(outcome, case=replace(outcome.case, target=0.017)), outcome.finishes[ADAPTIVE]
    assert adaptive[1].marks[-1].samples < fixed[1].end.samples
    assert results.loss_gaps(outcome) == [0.0, 0.0]
    late = {seed: replace(finish, end=None) for seed, finish in adaptive.items()}
    assert results.loss_gaps(replace(outcome, finishes={**outcome.finishes, ADAPTIVE: late})) == [math.inf, math.inf]


def test_no_gain_is_said():
    """A ratio of one, or worse, is called no gain, and a bound that does not hold is called broken."""
    outcome = make_outcome(adaptive=1.2)
    text = page.note(outcome, results.figures(outcome))
    assert "NO GAIN over the best fixed batch (128): 1.20 times its seconds" in text
    assert "default start up to 1.05: BROKEN" in text


def test_a_run_that_does_not_arrive_is_not_hidden():
    """Its ratio is left out of the figures, and the page names the reason."""
    outcome = make_outcome(adaptive=None)
    figures = results.figures(outcome)
    assert "adaptive_over_best_fixed" not in figures
    text = page.of_comparison(outcome, figures, task="digits")
    assert "the adaptive run did NOT ARRIVE" in text
    assert "2 of 2 not: lost" in text
    assert "Absent: not installed." in text
    assert "with any rate that was tried, in up to 6,000 steps: fixed 16." in text


def test_the_page_says_how_far_off_the_far_starts_were():
    """Where the further seeds have another batch first than the searches had; else they are 16 times off, as said."""
    outcome = make_outcome(adaptive=0.5)
    assert "The far starts" not in page.of_comparison(outcome, results.figures(outcome), task="digits")
    quick = Search(best=0.1, finishes={0.1: arrived(1, batch=256, seconds=0.001)})
    outcome = replace(outcome, searches={**outcome.searches, 256: quick})
    text = page.of_comparison(outcome, results.figures(outcome), task="digits")
    assert "are 16 and 4,096, for the searches had 256 first. Of 128, which the further seeds have first, " in text
    assert "they are 8 times too small and 32 times too large." in text


def arrived(steps, *, batch=1, seconds=None):
    end = Mark(steps=steps, samples=steps * batch, seconds=steps / 1000 if seconds is None else seconds, loss=0.017)
    row = {"step": 1, "progress/samples": batch, "batch/global": batch, "train/lr": 0.1, "noise_scale/value": 100.0}
    return Finish(end=end, reason="", marks=[end], rows=[row, row], step_s={})


def make_outcome(*, adaptive):
    """Three fixed batches on a hyperbola, the middle one the fastest, and an adaptive variant that takes part of it."""
    factor = {64: 2, 128: 1, 256: 2}
    finishes = {
        fixed_name(batch): {
            seed: arrived(steps * seed, batch=batch, seconds=steps / 1000 * factor[batch]) for seed in (1, 2)
        }
        for batch, steps in STEPS.items()
    }
    lost = Finish(end=None, reason="lost", marks=[], rows=[], step_s={})
    finishes[ADAPTIVE] = {
        seed: lost if adaptive is None else arrived(2_000 * seed * adaptive, batch=128, seconds=2 * adaptive)
        for seed in (1, 2)
    }
    searches = {
        batch: Search(best=0.1, finishes={0.1: arrived(steps, batch=batch, seconds=steps / 1000 * factor[batch])})
        for batch, steps in STEPS.items()
    }
    return Outcome(
        case=benchmark_cases(quick=False)["digits"],
        searches=searches,
        failed_searches={16: Search(best=None, finishes={0.1: replace(arrived(6_000), end=None)})},
        adaptive_search=Search(best=0.1, finishes={0.1: arrived(1_000)}),
        finishes=finishes,
        step_s={(batch // 2, 1): 0.001 + 1e-5 * batch for batch in STEPS},
        rates=dict.fromkeys(finishes, 0.1),
        absent={ADAPTDL: "not installed"},
    )
