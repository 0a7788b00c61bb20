"""Proves that the benchmark of exchanges computes what it says from what it measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks import exchange
from benchmarks.accuracy.repetitions import Form
from benchmarks.exchanges import local_updates, meter_coverage, random_bases, sent_bytes, slow_networks
from dptrain.tasks import exact_noise
from tests.replicas import run_replicas


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


def test_bytes_are_compared_without_headers_and_agreement():
    """Rounds of 2 steps and 10,200 bytes in 2 packets, of which 68 and 100 a step are not said: 4,966 of 5,000."""
    steps = [(step, 8 * step, 0.1 * step, 10_200 * (step // 2), 2 * (step // 2)) for step in range(1, 16)]
    steps[9:] = [(*one[:3], one[3] + 5_000, one[4] + 4) for one in steps[9:]]  # sent again, once
    payload = sent_bytes.payload_of_step({"steps": steps}, every=2)
    assert payload == pytest.approx((10_200 - 2 * 66) / 2)
    sizes = {"wire": 5_100.0, "packets": 1.0, "payload": payload, "agreement": 100.0}
    rows = [sent_bytes.row("local 2", replicas=2, said=5_000.0, **sizes), {"collective": "all_reduce"}]
    rows.append(sent_bytes.row("ensemble", replicas=2, said=0.0, **sizes))
    found = sent_bytes.figures(rows)
    assert found["bytes_error_max"] == pytest.approx(1 - (5_034 - 100) / 5_000)
    assert found["wire_over_said_max"] == pytest.approx(1.02)


def test_tables_of_a_page_are_those_of_the_rows():
    """A table is put in the place of the one before; text round it and tables of other names stay."""
    row = {"part": "codistillation", "arm": "one model", "batch": 256, "loss": 1.2345, "accuracy": 0.5}
    page = "a\n<!-- table codistillation -->\nold\n<!-- /table -->\nb\n<!-- table other -->\nc\n<!-- /table -->\n"
    found = exchange.filled(page, {}, [row, {"part": "networks", "kind": "int8"}])
    assert found == page.replace("old\n", exchange.rows_table([row], exchange.TABLES["codistillation"][2]))
    assert "| 256 | one model | 1.234 | 50.0% |" in found


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
        steps.append((step, 8 * step, seconds, sent, 2 * step))
    assert slow_networks.per_step({"steps": steps}, every=4) == pytest.approx((0.35, 260.0, 2.0))


@pytest.mark.parametrize(("kind", "size"), [("full", 0), ("fixed", 64), ("redrawn", 64)])
def test_every_way_to_train_learns_something(kind, size):
    """After a few steps on digits the held-out loss is lower than before the first."""
    arm = random_bases.Arm(task="digits", kind=kind, size=size)
    before, after = (random_bases.train(arm, rate=0.3, seed=0, num_steps=steps)["loss"] for steps in (0, 40))
    assert after < before - 0.03


def test_the_noise_of_a_set_is_that_of_its_samples_one_by_one():
    """Over independent draws the covariance divides by the number of samples, and not by one less."""
    torch.manual_seed(0)
    model, number = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), 12
    inputs, classes = torch.randn(number, 5), torch.randint(0, 3, (number,))
    found = local_updates.exact_noise(model, inputs, classes)
    pairs = list(zip(inputs, classes, strict=True))
    exact = exact_noise(model, lambda called, batch: functional.cross_entropy(called(batch[0]), batch[1]), pairs)
    assert found.grad_sq_norm == pytest.approx(exact.grad_sq_norm, rel=1e-4)
    assert found.noise_trace == pytest.approx(exact.noise_trace * (number - 1) / number, rel=1e-4)


def short_coverage(rank, world_size):
    form = Form(num_copies=30, rounds=1, shortening=2)
    return meter_coverage.measured_kinds(rank, world_size, form, ["linear"])


def test_the_interval_holds_the_truth_under_every_codec_or_the_kind_is_refused():
    """Thirty repetitions of twenty steps: a 95 % interval holds it in 25 or more (fewer 1 time in 5,000)."""
    rows = run_replicas(short_coverage, world_size=2)[0]
    coverage = {row["wrapper"]: row["coverage"] for row in rows if "coverage" in row}
    assert set(coverage) == set(meter_coverage.MEASURED)
    assert min(coverage.values()) >= 25 / 30
    assert {row["wrapper"] for row in rows if "there is no noise scale here" in row.get("refused", "")} == set(
        meter_coverage.REFUSED
    )
