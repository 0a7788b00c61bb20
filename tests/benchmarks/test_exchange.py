"""Proves that the benchmark of exchanges computes what it says from what it measured."""

from __future__ import annotations

import pytest

from benchmarks import exchange
from benchmarks.exchanges import random_bases, slow_networks


def row(kind, *, sent, said, step_s, steps=(), every=1, agreement=100.0, mbit=100, delay_s=0.05):
    return {
        "kind": kind,
        "mbit": mbit,
        "delay_s": delay_s,
        "batch": 32,
        "every": every,
        "step_s": step_s,
        "sent": sent,
        "said": said,
        "agreement": agreement,
        "steps": list(steps),
    }


ROWS = [
    row("all_reduce", sent=10_200.0, said=10_000.0, step_s=1.0, steps=(10, 12, 11)),
    row("all_reduce", sent=10_200.0, said=10_000.0, step_s=2.0, steps=(4, 4, 5)),
    row("local 8", sent=5_000.0, said=5_000.0, step_s=0.2, steps=(9, 16, 24), every=8),
    row("powersgd", sent=1_000.0, said=800.0, step_s=0.1, steps=(1, None, 1)),
    row("ensemble", sent=100.0, said=0.0, step_s=0.1),
]


def test_bytes_are_compared_without_the_agreement():
    """(10,200 − 100)/10,000 is 1 % off, (5,000 − 100)/5,000 2 %; kinds that hardly send are left out."""
    assert exchange.network_figures(ROWS)["bytes_error_max"] == pytest.approx(0.02)


def test_kinds_are_compared_at_their_best_batch_and_after_an_exchange():
    """All-reduce takes 8, 8 and 10 s; local updates 16, 16 and 24 steps of 0.2 s; a missed target is no result."""
    assert exchange.best_seconds(ROWS[:2]) == [8.0, 8.0, 10.0]
    assert exchange.best_seconds(ROWS[2:4]) == pytest.approx([3.2, 3.2, 4.8])
    assert exchange.network_figures(ROWS)["slow_best_over_all_reduce"] == pytest.approx(0.4)


def test_a_step_is_timed_over_whole_rounds():
    """Rounds of 4 steps, of which one takes a second more and 1,000 bytes: a mean over rounds has a quarter of it."""
    steps, seconds, sent = [], 0.0, 0
    for step in range(1, 16):
        seconds, sent = seconds + 0.1 + (step % 4 == 0), sent + 10 + 1000 * (step % 4 == 0)
        steps.append((step, 8 * step, seconds, sent))
    assert slow_networks.per_step({"steps": steps}, every=4) == pytest.approx((0.35, 260.0))


@pytest.mark.parametrize(("kind", "size"), [("full", 0), ("fixed", 64), ("redrawn", 64)])
def test_every_way_to_train_learns_something(kind, size):
    """After a few steps on digits the held-out loss is lower than before the first."""
    arm = random_bases.Arm(task="digits", kind=kind, size=size)
    before, after = (random_bases.train(arm, rate=0.3, seed=0, num_steps=steps)["loss"] for steps in (0, 40))
    assert after < before - 0.03
