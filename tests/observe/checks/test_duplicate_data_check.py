"""Replicas that see the same samples are noticed, and those that do not are left alone."""

from __future__ import annotations

import random
import warnings

import pytest
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck, is_check
from tests.observe.plain import make_model, mean_loss, micro_batch
from tests.replicas import run_replicas


def same_samples(rank, world_size):
    """Ranks 0 and 2 see the same samples; return what is said, when, and how often."""
    model = DistributedDataParallel(make_model())
    meter = dptrain.attach(model, every=1)
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            mean_loss(model, *micro_batch(step, 0, rank % 2)).backward()
            found.append(meter.step().identical_ranks)
            model.zero_grad()
    return found, [str(w.message) for w in caught if "same samples" in str(w.message)]


def test_ranks_with_the_same_samples_are_named():
    """After two agreements in a row the ranks are named on all ranks, with one warning from one of them."""
    results = run_replicas(same_samples, world_size=3)
    assert [found for found, _ in results] == [[(), *[((0, 2),)] * 11]] * 3
    assert [len(reported) for _, reported in results] == [1, 0, 0]
    assert "ranks 0 and 2" in results[0][1][0]


@pytest.mark.parametrize("squares", [[1.0, 2.0, 3.0], [0.0, 0.0], [float("nan"), float("nan")], [float("inf")] * 2])
def test_nothing_is_said_of_other_ranks(squares):
    """Different, empty or broken gradients are no sign of equal samples."""
    check = DuplicateDataCheck(None)
    for _ in range(2):
        check.judge(squares)
    assert check.identical_ranks == ()


def test_one_agreement_may_be_chance():
    """Two ranks that agree once, and not at the next comparison, are not named."""
    check = DuplicateDataCheck(None)
    for squares in ([1.0, 1.0], [1.0, 2.0], [3.0, 3.0]):
        check.judge(squares)
        assert check.identical_ranks == ()


def made():
    """A check that has no process group to warn in."""
    check = DuplicateDataCheck(None)
    check._warned = True
    return check


def test_thousands_of_ranks_come_near_one_another_by_chance():
    """With a spread of 1 % over 10,000 ranks neighbours are nearer than rounding: only equal bits are reported."""
    check, generator = made(), random.Random(0)
    for _ in range(3):
        squares = [1 + 0.01 * generator.random() for _ in range(10_000)]
        squares[7] = squares[4321]
        check.judge(squares)
    assert check.identical_ranks == ((7, 4321),)


def test_no_false_alarm_among_ranks_of_their_own():
    """In 2,000 runs of three looks at 2 to 64 ranks that differ by a hundredth to all of themselves."""
    generator = random.Random(1)
    for _ in range(2000):
        check, spread = made(), 10 ** generator.uniform(-2, 0)
        num_ranks = generator.randint(2, 64)
        for _ in range(3):
            check.judge([1 + spread * generator.random() for _ in range(num_ranks)])
        assert check.identical_ranks == ()


def test_the_same_samples_in_another_order_are_noticed():
    """Ranks that agree but for rounding are named after three looks; others between them do not hide it."""
    check, generator = made(), random.Random(2)
    for look in range(3):
        squares = [1 + generator.random() for _ in range(8)]
        squares[5] = squares[2] * (1 + 3e-7)
        assert check.identical_ranks == (), look
        check.judge(squares)
    assert check.identical_ranks == ((2, 5),)


def test_comparing_is_rare():
    """Of a million measured steps eight are compared."""
    assert [number for number in range(1, 1_000_001) if is_check(number)] == [1, 2] + [10**k for k in range(1, 7)]
