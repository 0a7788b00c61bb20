"""Micro-batches that differ in kind by their place in the step are noticed, and exchangeable ones are left alone."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as logistic

import dptrain
from dptrain.observe.checks.exchangeability import Exchangeability, halves

NUM_CONTRASTS = 9


def found_after(draw, *, effect=0.0, num_steps=600):
    """Return the step at which contrasts of drawn noise and a fixed part are reported; None for never."""
    check = Exchangeability()
    for step in range(num_steps):
        check.expect([(step % 2, k) for k in range(NUM_CONTRASTS)])
        contrasts = [draw() + effect * (-1) ** k for k in range(NUM_CONTRASTS)]
        if check.judge(contrasts, valid=True):
            return step
    return None


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_what_is_symmetric_is_never_reported(tails):
    """Of 40 courses of 600 steps none, whatever the tails: the bound asks for symmetry alone."""
    for seed in range(40):
        rng = random.Random(seed)
        draws = {"normal": lambda r=rng: r.gauss(0, 1), "heavy": lambda r=rng: r.choice((-1, 1)) * r.paretovariate(1.1)}
        assert found_after(draws[tails]) is None, seed


def test_a_persistent_difference_is_found_in_time():
    """One as large as the noise of a contrast within 60 steps, half of that within 150, a twentieth never."""
    for seed in range(10):
        rng = random.Random(seed)
        assert found_after(lambda r=rng: r.gauss(0, 1), effect=1.0) < 60
        assert found_after(lambda r=rng: r.gauss(0, 1), effect=0.5) < 150
        assert found_after(lambda r=rng: r.gauss(0, 1), effect=0.05) is None


def test_steps_that_do_not_count_teach_nothing():
    """A dropped step, and one that is not finite, leave no trace."""
    check = Exchangeability()
    for contrasts, valid in (([1.0], False), ([float("nan")], True)) * 100:
        check.expect([0])
        assert not check.judge(contrasts, valid=valid)
    assert not check.found


@pytest.mark.parametrize("num_micro_batches", range(2, 8))
@pytest.mark.parametrize("number", [1, 2])
def test_both_sets_have_equal_numbers(num_micro_batches, number):
    """Two sets that do not overlap, so that exchanging them changes nothing in a correct loop."""
    first, second = halves(num_micro_batches, number=number)
    assert len(first) == len(second) == num_micro_batches // 2
    assert not set(first) & set(second)
    assert max(*first, *second) < num_micro_batches


def reported(loss_of, *, num_steps=120, accumulation_steps=2, seed=0):
    """Return (warnings, those of the reading) of a loop in one process; `loss_of(model, x, place)` is one loss."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught, dptrain.attach(model, every=1) as meter:
        warnings.simplefilter("always")
        for _ in range(num_steps):
            model.zero_grad()
            for place in range(accumulation_steps):
                loss_of(model, torch.randn(4, 6, generator=generator), place).backward()
            meter.step()
        return [str(w.message) for w in caught], meter.read().warnings


def judge(model, x, place):
    """Return a GAN's loss on real samples (even places) or generated ones."""
    scores = model(x if place % 2 == 0 else x * 0.7 + 0.1)
    return logistic(scores, torch.full_like(scores, 1.0 - place % 2))


def weighted(model, x, place):
    return model(x).square().mean() * (0.7, 0.3)[place]


def plain(model, x, _):
    return (model(x) - x.sum(1, keepdim=True)).square().mean() / 2


@pytest.mark.parametrize(("loss_of", "accumulation_steps"), [(judge, 2), (judge, 4), (weighted, 2)])
def test_losses_of_two_kinds_are_reported_once(loss_of, accumulation_steps):
    """A GAN's two losses with a backward pass each, and weights that the meter is not told: a warning, kept with it."""
    caught, kept = reported(loss_of, accumulation_steps=accumulation_steps)
    assert len(caught) == 1
    assert "differ in kind" in caught[0]
    assert any("differ in kind" in sentence for sentence in kept)


@pytest.mark.parametrize("accumulation_steps", [2, 3])
def test_a_plain_loop_is_not_reported(accumulation_steps):
    """Micro-batches of one kind, an even and an odd number of them."""
    assert reported(plain, accumulation_steps=accumulation_steps) == ([], ())
