"""The unseen tasks and regimes: delays that are real, tasks that train, and how ratios are put together."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.utils.data import default_collate

from benchmarks import time_to_target_unseen as unseen
from benchmarks.targets import new_tasks
from benchmarks.targets.benchmark_case import Search, benchmark_cases
from benchmarks.targets.results import ADAPTIVE
from benchmarks.targets.timed_run import Finish, Mark, Pair, StepDelay

LIGHT = ["lstm_bytes", "denoiser", "policy_gradient"]


@pytest.mark.parametrize("name", LIGHT)
def test_a_task_trains(name):
    """Sixty steps of Adam lower the held-out loss of each new task, by a function of the seed alone."""

    def trained():
        torch.manual_seed(0)
        task = getattr(new_tasks, name)()
        held_out = default_collate([task.eval_data[i] for i in range(64)])
        optimizer = torch.optim.Adam(task.model.parameters(), lr=0.01)
        losses = [task.loss(task.model, held_out).item()]
        for step in range(60):
            batch = default_collate([task.train_data[32 * step + i] for i in range(32)])
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()
        return [*losses, task.loss(task.model, held_out).item()]

    first, last = trained()
    assert last < 0.95 * first
    assert trained() == [first, last]


def test_the_policy_gradient_is_that_of_the_expected_reward():
    """Over all draws of an action the mean gradient is the gradient of the expected error rate."""
    model = torch.nn.Linear(3, 4)
    pixels, classes = torch.randn(1, 3), torch.tensor([2])
    (1 - model(pixels).softmax(1)[0, 2]).backward()
    exact = model.weight.grad.clone()
    model.zero_grad()
    draws = (torch.arange(20_000) + 0.5) / 20_000
    batch = pixels.expand(len(draws), 3), classes.expand(len(draws)), draws
    new_tasks._policy_loss(model, batch).backward()
    torch.testing.assert_close(model.weight.grad, exact, atol=1e-3, rtol=1e-2)


def test_a_device_that_is_not_full_takes_as_long_for_less():
    """Up to the full micro-batch the sleep is the same; beyond, it is in proportion."""
    delay = StepDelay(per_sample_s=0.001, full_at_samples=32)
    assert [delay.micro_batch_s(n) for n in (1, 32, 64)] == pytest.approx([0.032, 0.032, 0.064])


def test_the_sleep_is_real():
    """The steps of a fixed batch take at least what they sleep, and so do those of a timed run."""
    case, delay = benchmark_cases(quick=True)["digits"], StepDelay(per_step_s=0.05)
    with Pair() as pair:
        assert unseen._step_s(case, 64, 0.002, delay=delay, run=pair.run) >= 0.05
        timed_run = case.adaptive(64, learning_rate=0.002, seed=1, most_steps=20)
        finish = pair.run(dataclasses.replace(timed_run, delay=delay))
    assert finish.marks[-1].seconds >= 0.05 * finish.marks[-1].steps


def test_all_variants_of_a_seed_run_before_the_next_seed():
    """A slow spell of the machine falls on all of them, and none is always the first."""
    case = benchmark_cases(quick=True)["digits"]
    ran = []

    def run(timed_run):
        seed, batch = (timed_run.settings[name] for name in ("seed", "global_batch_size"))
        ran.append((seed, batch, str(timed_run.settings.get("control"))))
        end = Mark(steps=100, samples=100.0 * batch, seconds=1.0 + batch / 64, loss=0.1)
        return Finish(end=end, reason="", marks=[end], rows=[], step_s={})

    searches = {b: Search(best=0.1, finishes={0.1: run(case.fixed(b, learning_rate=0.1, seed=9))}) for b in (32, 64)}
    ran.clear()
    found = unseen.compare(case, StepDelay(), searches=searches, rate=0.1, seeds=range(1, 4), run=run)
    assert found.best == "fixed 32"
    assert {len(of_seeds) for of_seeds in found.seconds.values()} == {3}
    seeds = [seed for seed, *_ in ran]
    assert seeds == sorted(seeds)
    firsts = [ran[seeds.index(seed)][1:] for seed in (1, 2, 3)]
    assert len(set(firsts)) > 1


def _compared(**seconds):
    named = {ADAPTIVE: seconds["adaptive"], "fixed 64": seconds["best"], "fixed 16": seconds["default"]}
    return unseen.Comparison(
        seconds={variant: dict(enumerate(found, start=1)) for variant, found in named.items()},
        best="fixed 64",
        default="fixed 16",
    )


def test_figures_are_the_medians_over_seeds_and_the_largest_over_regimes():
    """Held-back tasks count for the unseen figures, slow regimes for the others; a development task for neither."""
    found = {
        ("mnist1d_cnn", "plain"): _compared(adaptive=[1.1, 1.2, 1.3], best=[1.0] * 3, default=[2.0] * 3),
        ("gpt_bytes", "plain"): _compared(adaptive=[0.9] * 3, best=[1.0] * 3, default=[2.0] * 3),
        ("denoiser", "plain"): _compared(adaptive=[9.0] * 3, best=[1.0] * 3, default=[2.0] * 3),
        ("digits", "step-300ms"): _compared(adaptive=[1.0] * 3, best=[1.0] * 3, default=[2.0] * 3),
        ("digits", "step-30ms"): _compared(adaptive=[1.02] * 3, best=[1.0] * 3, default=[1.7] * 3),
    }
    figures = unseen.findings(found).figures
    assert figures["unseen_median"] == pytest.approx(1.05)
    assert figures["unseen_max"] == pytest.approx(1.2)
    assert figures["slow_over_best_fixed"] == pytest.approx(1.02)
    assert figures["slow_over_default_fixed"] == pytest.approx(0.6)


def test_the_interval_is_paired_and_open_where_a_run_did_not_arrive():
    """By Student's t on the logarithms; one run alone, or one that is lost, has none."""
    low, high = unseen.interval([0.8, 1.0, 1.25])
    assert low * high == pytest.approx(1.0)
    assert high == pytest.approx(math.exp(4.3027 * 0.22314 / math.sqrt(3)), rel=1e-3)
    assert unseen.interval([1.0]) == unseen.interval([1.0, math.inf]) == (0.0, math.inf)


def test_a_run_that_did_not_arrive_is_shown_as_that():
    """Its ratio is infinite, its row says so, and JSON gets null."""
    lost = _compared(adaptive=[math.inf] * 3, best=[1.0] * 3, default=[2.0] * 3)
    rows = unseen.findings({("digits", "plain"): lost}).rows
    row = next(row for row in rows if row["variant"] == ADAPTIVE)
    assert row["shown_ratio"] == "not at the target"
    assert row["ratios"] == [None] * 3
