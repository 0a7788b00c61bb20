"""The benchmark of local parallelism: its two processes train what one does, and its page says what its rows hold."""

from __future__ import annotations

import json

import pytest

from benchmarks.local_parallelism import __main__ as benchmark
from benchmarks.local_parallelism import page, ratios


def test_two_processes_train_what_one_does():
    """1F1B on two halves, and two local blocks that never wait for a gradient, move parameters as one process does."""
    assert benchmark.equality_error() < 1e-4


def test_a_ratio_is_of_the_two_rounds_of_a_turn():
    """A load that slows down a whole turn leaves the ratio alone; the interval holds the median."""
    loads = (1.0, 3.0, 1.0, 2.0, 8.0)
    rounds = [
        {"way": way, "micro_batches": 4, "seconds": seconds * load, "waited": 0.5, "cpu_s": cpu_s}
        for load in loads
        for way, seconds, cpu_s in (("local blocks", 0.8, 0.3), ("1F1B", 1.0, 0.25))
    ]
    (row,) = ratios.throughput_rows(rounds, steps=2, pass_s=0.04)
    assert row["ratio"] == pytest.approx((1.25, 1.25, 1.25))
    assert row["cpu"] == pytest.approx(1.2)
    assert row["without_bubbles"] == pytest.approx(10 / (8 + 1 / 3))
    assert row["samples_per_s"]["local blocks"] == pytest.approx(2 * 4 * 8 / 1.6)
    low, middle, high = ratios.median_interval([1.0, 1.1, 1.2, 1.3, 5.0])
    assert middle == pytest.approx(1.2)
    assert 1.0 <= low < middle < high <= 5.0


def test_the_page_compares_seed_by_seed(tmp_path):
    """The difference to end to end is that of pairs, whose spread may be smaller; blocks have a row each."""
    scales = [[None, None, None], [5.0, 10.0, None]]
    rows = [
        {
            "part": "losses", "arm": name, "losses": losses, "loss": sum(losses) / 2, "spread": 0.5, "gflop": 1.0,
            "noise_scale": scales, "noise_scale_of_blocks": {"local_blocks.0": scales} if "local" in name else {},
        }
        for name, losses in {"end to end": [2.0, 3.0], "2 local blocks": [2.1, 3.1]}.items()
    ]  # fmt: skip
    figures = benchmark.figures_of(rows)
    assert figures == {"loss_above_end_to_end_2_local_blocks": pytest.approx(0.1)}
    environment = {"processor": "p", "cpu_count": 2, "torch": "2"}
    found = {"command": "c", "environment": environment, "figures": figures, "rows": rows}
    (tmp_path / "a.json").write_text(json.dumps(found))
    text = page.page(tmp_path / "a.json")
    assert "| 2 local blocks | 2.6000 ± 0.5000 | +0.1000 ± 0.0000 | 1 | not resolved, 10 [5, –] |" in text
    assert "| 2 local blocks | local_blocks.0 | not resolved, 10 [5, –] |" in text
