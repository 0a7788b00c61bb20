"""Replicas that see the same samples are noticed, and those that do not are left alone."""

from __future__ import annotations

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


def test_comparing_is_rare():
    """Of a million measured steps eight are compared."""
    assert [number for number in range(1, 1_000_001) if is_check(number)] == [1, 2] + [10**k for k in range(1, 7)]
