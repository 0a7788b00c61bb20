"""The quick form of `benchmarks.prediction`, run as its reader would run it, and the parts of the atlas alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.prediction import __main__ as prediction
from benchmarks.prediction import policy
from benchmarks.prediction.average import run_average
from benchmarks.prediction.problem import Problem, first_crossings
from benchmarks.prediction.problems import absent, atlas
from benchmarks.prediction.quadratics import Quadratic
from benchmarks.prediction.search import search
from dptrain.noise import SquaredNorms, unbiased_moments

ROOT = Path(__file__).parents[3]


# The whole


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """What the quick form says, and the folder of its figures."""
    folder = tmp_path_factory.mktemp("figures")
    command = [sys.executable, "-m", "benchmarks.prediction", "--quick", "--json", "-", "--figures", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


def test_quick_form_charts_every_small_problem_at_both_targets(quick):
    """Each has a critical batch, found on six batches or more with the best rate inside the grid."""
    result, _ = quick
    rows = result["rows"]
    assert len(rows) == 2 * len(atlas(quick=True)) >= 2 * 3
    for row in rows:
        assert row["critical_batch_size"] > 0
        if row["verdict"] != "not a hyperbola":
            assert row["lower"] < row["critical_batch_size"] < row["upper"], row
        assert len(row["frontier"]) >= 6
        assert row["rates_inside"]


def test_steps_fall_with_the_batch_and_the_curve_bends(quick):
    """Small batches need many times the steps of large ones, and the largest two are nearly the same."""
    result, _ = quick
    for row in result["rows"]:
        steps = [np.mean(point["steps"]) for point in row["frontier"]]
        assert steps[0] > 4 * steps[-1], row
        assert steps[-2] < 1.5 * steps[-1], row


def test_noise_scale_tells_the_critical_batch_of_small_problems(quick):
    """Over the quick form's decades the prediction is within a factor of ten at worst, and follows the truth."""
    figures = quick[0]["figures"]
    assert figures["num_tasks"] >= 3
    assert figures["decades"] > 1
    assert figures["r2"] > 0.7
    assert figures["rms_decades"] <= figures["largest_miss_decades"] < 1


def test_later_targets_have_larger_batches_and_noise(quick):
    """In most problems both the critical batch and the noise scale grow from the early to the late target."""
    figures = quick[0]["figures"]
    assert figures["num_grown"] >= figures["num_tasks"] - 1


def test_figures_are_drawn(quick):
    """Both pictures are there, and are pictures."""
    for name in ("prediction.png", "prediction_frontiers.png"):
        assert (quick[1] / name).read_bytes().startswith(b"\x89PNG")


def test_a_package_that_is_not_there_is_named(monkeypatch):
    """Without gymnasium its problem is left out, and said to be."""
    assert not absent()
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda _name: None)
    assert absent() == ["CartPole, policy gradient (gymnasium is not installed)"]
    assert "CartPole, policy gradient" not in {problem.name for problem in atlas(quick=False)}


def test_the_atlas_holds_what_it_promises():
    """At least eight problems, of which at least half are trained models; each on six batches of powers of two."""
    problems = atlas(quick=False)
    assert len({problem.name for problem in problems}) == len(problems) >= 8
    assert sum(problem.kind != "quadratic" for problem in problems) >= len(problems) / 2
    for problem in problems:
        assert len(problem.batch_sizes) >= 6
        assert all(math.log2(size) % 1 == 0 for size in problem.batch_sizes)
        assert problem.targets[0] > problem.targets[1]


# Its figures


def _found(task, *, critical, noise, stage="late", kind="supervised"):
    return {
        "task": task,
        "kind": kind,
        "stage": stage,
        "critical_batch_size": critical,
        "noise_scale": noise,
        "noise_scale_by_progress": noise,
        "noise_scale_cold": noise,
        "verdict": "hyperbola",
    }


def test_figures_of_a_perfect_prediction_that_is_twice_too_large():
    """Twice the truth everywhere correlates perfectly, and misses by log10 2 = 0.301 decades."""
    figures = prediction._figures([_found(str(size), critical=size, noise=2 * size) for size in (10.0, 100.0, 1e4)])
    assert figures["r2"] == pytest.approx(1)
    assert figures["rms_decades"] == pytest.approx(math.log10(2))
    assert (figures["num_tasks"], figures["decades"]) == (3, pytest.approx(3))


def test_tasks_without_a_number_are_left_out_and_counted():
    """A task whose curve does not bend, or whose noise was not resolved, is in no figure but in `num_left_out`."""
    rows = [_found(str(size), critical=size, noise=size) for size in (10.0, 100.0, 1e3)]
    straight = _found("no bend", critical=None, noise=5.0)
    silent = _found("not resolved", critical=50.0, noise=None)
    figures = prediction._figures([*rows, straight, silent])
    assert (figures["num_tasks"], figures["num_left_out"]) == (3, 2)


def test_headline_takes_the_late_targets_and_trained_models_have_figures_of_their_own():
    """Early targets and quadratics do not polish the figures that leave them out."""
    rows = [
        _found("a", critical=10.0, noise=10.0),
        _found("b", critical=100.0, noise=1000.0),
        _found("c", critical=50.0, noise=50.0),
        _found("a", critical=1.0, noise=100.0, stage="early"),
        _found("q", critical=1e6, noise=1e6, kind="quadratic"),
    ]
    figures = prediction._figures(rows)
    assert (figures["num_tasks"], figures["decades"], figures["trained_decades"]) == (4, 5, 1)
    assert figures["trained_rms_decades"] == pytest.approx(math.sqrt(1 / 3))
    assert figures["both_targets_rms_decades"] == pytest.approx(math.sqrt(5 / 5))


def test_the_rank_correlation_is_within_the_supervised_tasks():
    """Five tasks in the right order but for one pair have 0.9, whatever the quadratics do; three have none."""
    rows = [
        _found(str(n), critical=10.0 * n, noise=noise, kind="supervised")
        for n, noise in enumerate((5.0, 8.0, 7.0, 9.0, 20.0), start=1)
    ]
    rows.append(_found("q", critical=1e6, noise=1.0, kind="quadratic"))
    assert prediction._figures(rows)["supervised_spearman"] == pytest.approx(0.9)
    assert "supervised_spearman" not in prediction._figures([*rows[:3], rows[-1]])


# The average over a run


def _exact(*, noise_trace, grad_sq_norm, batch_size=64, num_parts=8):
    """The squared norms of a step as they are in expectation."""
    part = batch_size / num_parts
    return SquaredNorms.of(
        [grad_sq_norm + noise_trace / part] * num_parts,
        sizes=[part] * num_parts,
        large_sq_norm=grad_sq_norm + noise_trace / batch_size,
    )


def test_each_part_of_a_run_counts_by_its_length():
    """Half a run at φ = 10 and half at φ = 1,000 average to 505, though |G|² is 100 times larger in the first."""
    run = [_exact(noise_trace=100, grad_sq_norm=10)] * 50 + [_exact(noise_trace=100, grad_sq_norm=0.1)] * 50
    assert run_average([run]).over_steps == pytest.approx(505)


def test_runs_of_unequal_length_are_laid_side_by_side():
    """Two runs through the same course in 40 and 80 steps have the same windows: 20 and 60 average to 40."""
    course = [_exact(noise_trace=20, grad_sq_norm=1), _exact(noise_trace=60, grad_sq_norm=1)]
    runs = [[step for step in course for _ in range(num)] for num in (20, 40)]
    assert run_average(runs).over_steps == pytest.approx(40)


def test_progress_weighs_noisy_steps_less():
    """At B = 64, φ = 64 makes half the progress of a noiseless step and φ = 192 a quarter: (64/2 + 192/4)/(3/4)."""
    run = [_exact(noise_trace=64, grad_sq_norm=1)] * 30 + [_exact(noise_trace=192, grad_sq_norm=1)] * 30
    assert run_average([run]).over_progress == pytest.approx((64 / 2 + 192 / 4) / (3 / 4))


def test_what_is_not_resolved_is_pooled_or_said():
    """A run of noise alone has no average; a start that is resolved takes what cannot be resolved after it."""
    generator = np.random.default_rng(0)

    def noisy(mean):
        parts = mean + generator.standard_normal((8, 50))
        return SquaredNorms.of(
            (parts**2).sum(1).tolist(), sizes=[1.0] * 8, large_sq_norm=float((parts.mean(0) ** 2).sum())
        )

    assert run_average([[noisy(0.0) for _ in range(20)]]) is None
    mixed = run_average([[noisy(1.0) for _ in range(90)] + [noisy(0.0) for _ in range(10)]])
    assert 1 < mixed.over_steps < 1.5


# The steps to a target


class Falling:
    """A loss that falls by one factor in each step."""

    def __init__(self, factor):
        self.factor = factor
        self.value = 1.0

    def step(self):
        self.value *= self.factor

    def loss(self):
        return self.value


def test_crossings_are_between_steps():
    """Of a loss that falls as 0.9^t, 0.5 and 0.003 are crossed at ln 0.5/ln 0.9 and ln 0.003/ln 0.9."""
    expected = [math.log(target) / math.log(0.9) for target in (0.5, 0.003)]
    assert first_crossings(Falling(0.9), targets=(0.5, 0.003), limit=1000) == pytest.approx(expected)


def test_hopeless_runs_are_given_up():
    """A run that diverges, is not a number or comes to its limit reports only the targets that it reached."""
    assert first_crossings(Falling(2.0), targets=(0.5,), limit=10**9) == []
    assert first_crossings(Falling(math.nan), targets=(0.5,), limit=10**9) == []
    assert len(first_crossings(Falling(0.9), targets=(0.5, 0.003), limit=20)) == 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Valley(Problem):
    """Steps to a target are known: (1 + critical/B) times x + 1/x over two, x the rate over its best value."""

    name: str = "valley"
    kind: str = "quadratic"
    optimizer: str = "none"
    targets: tuple[float, float] = (0.5, 0.1)
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    first_rate: float = 0.01
    max_steps: int = 10_000
    num_seeds: int = 2
    critical: tuple[float, float] = (8.0, 64.0)

    def learner(self, **_):
        raise NotImplementedError

    def best_rate(self, batch_size, target):
        return (0.5, 0.25)[target] / (1 + self.critical[target] / batch_size)

    def crossings(self, *, batch_size, rates, limits):
        steps = np.empty((len(rates), self.num_seeds, 2))
        for target in range(2):
            x = np.array(rates) / self.best_rate(batch_size, target)
            taken = 20 * (target + 1) * (1 + self.critical[target] / batch_size) * (x + 1 / x) / 2
            steps[..., target] = np.where((taken <= limits[target]) & (x < 4), taken, np.inf)[:, None]
        return steps


def test_search_finds_the_best_rate_of_each_batch_and_target():
    """From a first rate fifty times too small, each best rate is the nearest grid point, worse ones on both sides."""
    problem = Valley()
    searched = search(problem)
    assert [one.batch_size for one in searched] == list(problem.batch_sizes)
    for one in searched:
        assert one.inside == (True, True)
        for target in range(2):
            off = math.log2(one.best[target] / problem.best_rate(one.batch_size, target))
            assert abs(off) <= 0.25 + 1e-9
            least = 20 * (target + 1) * (1 + problem.critical[target] / one.batch_size)
            assert one.steps(target) == pytest.approx([least] * 2, rel=0.02)


def test_a_target_out_of_reach_has_no_best_rate():
    """Where no rate reaches the late target, the early one is found all the same, the late one said to be out."""
    problem = Valley(max_steps=30, batch_sizes=(1024,), critical=(1.0, 1e6))
    (one,) = search(problem)
    assert one.best[0] is not None
    assert one.best[1] is None
    assert (one.steps(1), one.inside[1]) == ([], False)


# The problems


def _quadratic(**changes):
    order = np.arange(1, 9, dtype=np.float64)
    problem = Quadratic(
        name="small", targets=(0.3, 0.05), batch_sizes=(1, 2), curvature=1 / order, covariance=0.5 * order
    )
    return replace(problem, **changes)


def test_quadratic_without_noise_falls_as_its_closed_form():
    """Mean of (1 − ε h_i)^2t over the directions, crossed at the same step by the runs side by side and one alone."""
    problem = _quadratic(covariance=np.zeros(8))
    steps = problem.crossings(batch_size=1, rates=[0.5], limits=[500, 500])
    assert steps.shape == (1, problem.num_seeds, 2)
    alone = first_crossings(problem.learner(batch_size=1, rate=0.5, seed=0), targets=problem.targets, limit=500)
    for target, loss in enumerate(problem.targets):
        before = math.floor(steps[0, 0, target])
        closed = [((1 - 0.5 * problem.curvature) ** (2 * t)).mean() for t in (before, before + 1)]
        assert closed[1] <= loss < closed[0]
        assert alone[target] == pytest.approx(steps[0, 0, target], rel=0.01)


def test_quadratic_shows_the_noise_that_it_has():
    """At the start |G|² = Σ h_i and tr(Σ) = Σ c_i, in the mean over fresh runs, whatever the batch is."""
    problem = _quadratic()
    for batch_size in (8, 64):
        seen = [
            unbiased_moments(problem.learner(batch_size=batch_size, rate=0.1, seed=seed, num_parts=8).step())
            for seed in range(400)
        ]
        assert np.mean([one.noise_trace for one in seen]) == pytest.approx(problem.covariance.sum(), rel=0.05)
        assert np.mean([one.grad_sq_norm for one in seen]) == pytest.approx(problem.curvature.sum(), rel=0.1)


def test_measuring_does_not_change_a_run():
    """A network's run cut into parts, with the meter attached, is the same run to float tolerance."""
    (problem,) = (one for one in atlas(quick=True) if one.kind == "supervised")
    plain, measured = (problem.learner(batch_size=16, rate=0.5, seed=1, num_parts=parts) for parts in (None, 8))
    for _ in range(5):
        assert plain.step() is None
        seen = measured.step()
        assert (seen.num_small, seen.num_samples) == (8, 16)
    assert measured.loss() == pytest.approx(plain.loss(), rel=1e-5)


def test_policy_gradient_counts_frames_and_discounts_returns():
    """A batch of 256 frames is four poles; returns are −1 at a fall, discounted backwards, and never beyond it."""
    (problem,) = (one for one in atlas(quick=False) if one.kind == "policy")
    learner = problem.learner(batch_size=256, rate=0.01, seed=0, num_parts=4)
    frames = learner._play()
    returns, counts = frames["returns"], frames["counts"]
    assert returns.shape == (64, 4)
    put_up = (~counts[1:]).nonzero()
    assert len(put_up)  # random play falls within these frames
    for frame, pole in put_up.tolist():
        assert returns[frame, pole] == -1
        if frame and counts[frame - 1, pole]:
            assert returns[frame - 1, pole] == pytest.approx(-0.98)
    seen = learner.step()
    assert (seen.num_small, seen.num_samples) == (4, 256)
    assert 500 / learner.loss() < 40  # an untrained policy does not stand long


def test_policies_are_seeded():
    """Two runs of one seed are the same; another seed is another run."""
    (problem,) = (one for one in atlas(quick=False) if one.kind == "policy")
    runs = [problem.learner(batch_size=64, rate=0.01, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.step()
    first, again, other = (torch.cat([p.detach().flatten() for p in run._policy.parameters()]) for run in runs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
