"""The quick form of `benchmarks.faults`: a real run is killed, resized and damaged; and its audit can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults.__main__ import _worst
from benchmarks.faults.chaos import SAMPLES_PER_EVENT, Chaos, random_kills, resizes

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def figures():
    command = [sys.executable, "-m", "benchmarks.faults", "--quick", "--kills", "1", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["figures"]


def test_a1_kills_lose_nothing(figures):
    """As many restarts as kills, no sample lost or doubled, and the bytes of the run that nobody disturbed."""
    assert (figures["kills"], figures["restarts"]) == (1, 1)
    assert (figures["samples_lost"], figures["samples_doubled"], figures["sha_equal"]) == (0, 0, 1)
    assert 0 < figures["recovery_p50_s"] <= figures["recovery_p95_s"]


def test_c1_resizes_lose_nothing(figures):
    """From one replica to two: the batches and the samples of the undisturbed run."""
    assert (figures["resize_samples_lost"], figures["resize_samples_doubled"]) == (0, 0)
    assert figures["resize_batches_equal"] == 1


def test_b1_b4_no_checkpoint_is_lost_and_no_flip_missed(figures):
    """Of the quick form's writers and flips."""
    assert (figures["writer_kills"], figures["checkpoints_lost"]) == (8, 0)
    assert figures["flips_detected"] == figures["flips"] == 500


def test_the_guards_cost_little(figures):
    """Shares of time that a machine under load can hold, too."""
    assert 0 < figures["guard_share"] < 0.05
    assert 0 < figures["stall_share"] <= 0.01


def test_a_ledger_that_was_tampered_with_is_found_out(tmp_path):
    """The audit can fail: a micro-batch struck from the ledger is lost, one that was read twice is doubled."""
    run = Chaos(tmp_path, num_events=0, pace_s=0.0)
    run.survive([])
    assert run.samples_lost_and_doubled() == (0, 0)
    ledger = tmp_path / "ledger-0" / "0-1.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join([*lines[:-1], lines[-2]]))
    lost, doubled = run.samples_lost_and_doubled()
    assert lost == doubled == len(json.loads(lines[-1]))


def test_what_happens_is_decided_by_the_seed():
    """Equal seeds, equal events; they come in order, each in its own part of the run."""
    assert random_kills(20, seed=3) == random_kills(20, seed=3) != random_kills(20, seed=4)
    for events in (random_kills(20, seed=3), resizes((2, 3, 1), seed=3)):
        parts = [event.at_samples // SAMPLES_PER_EVENT for event in events]
        assert parts == list(range(len(events)))


def test_the_worse_of_two_passes_stays():
    """Counts add up; a pass that was not equal, or slower, is not forgotten."""
    before = {"kills": 3, "sha_equal": 1.0, "samples_lost": 0, "recovery_p95_s": 2.0}
    found = {"kills": 4, "sha_equal": 0.0, "samples_lost": 5, "recovery_p95_s": 1.0}
    assert _worst(before, found) == {"kills": 7, "sha_equal": 0.0, "samples_lost": 5, "recovery_p95_s": 2.0}
    assert _worst({}, found) == found
