"""What is said of runs of equal length, on made ones, and the quick form of the command."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.loss_at_equal_samples import Ended, draw, findings, frontier, loss_at_speed, page, seconds_at_loss
from benchmarks.targets.timed_run import Mark

ROOT = Path(__file__).parents[2]


def ended(loss, seconds, *, batch=64, spread=0.01):
    """Three seeds round a loss, the middle one at it."""
    marks = {
        seed: Mark(steps=100, samples=6_400, seconds=seconds, loss=loss + spread * (seed - 1)) for seed in (0, 1, 2)
    }
    return Ended(learning_rate=0.01, at_edge=False, ends=marks, batches=[batch] * 3)


FIXED = {"fixed 16": ended(2.0, 16.0), "fixed 32": ended(2.1, 12.0), "fixed 64": ended(2.04, 4.0)}


def test_a_batch_that_another_beats_in_both_counts_for_nothing():
    """The frontier runs from the fastest to the lowest; between two it is a line in the logarithm of the seconds."""
    assert frontier(FIXED.values()) == [FIXED["fixed 64"], FIXED["fixed 16"]]
    assert loss_at_speed(FIXED.values(), 8.0) == pytest.approx(2.02)
    assert loss_at_speed(FIXED.values(), 1.0) == 2.04
    assert loss_at_speed(FIXED.values(), 99.0) == 2.0
    assert seconds_at_loss(FIXED.values(), 2.02) == pytest.approx(8.0)
    assert seconds_at_loss(FIXED.values(), 1.9) == pytest.approx(16.0)


@pytest.mark.parametrize(
    ("loss", "gap", "ratio", "said"),
    [
        (2.025, 0.005, 8 / (4 * 2**0.75), "as low as"),
        (2.05, 0.03, 2.0, "HIGHER than"),
        (2.0, -0.02, 0.5, "lower than"),
    ],
)
def test_adaptive_runs_are_held_against_fixed_ones_of_their_speed(loss, gap, ratio, said):
    """The gap is to the frontier at the same seconds, and what the page says of it goes by the spread of seeds."""
    found = findings({**FIXED, "adaptive": ended(loss, 8.0)}, samples=6_400)
    assert found.figures["loss_gap_adaptive"] == pytest.approx(gap)
    assert found.figures["seconds_ratio_adaptive"] == pytest.approx(ratio)
    assert found.figures["loss_spread"] == pytest.approx(0.01)
    text = page(found, task="pysource", samples=6_400, num_seeds=3)
    assert f"adaptive ends {said} fixed batches of its speed ({gap:+.3g}, seeds spread by 0.01)" in text
    assert f"in {ratio:.2f} of the seconds of fixed batches of its loss" in text
    assert "| fixed 64 | 0.01 | 2.04 (2.03–2.05) | 4 (4–4) | 64 (64–64) |  |  |" in text


def test_a_variant_that_diverges_is_not_judged_by_the_runs_that_did_not():
    """Its median loss counts what is lost as infinite, and the row says how many are."""
    whole = ended(2.0, 8.0)
    assert dataclasses.replace(whole, batches=[64] * 7).loss == math.inf
    one_lost = dataclasses.replace(whole, batches=[64] * 4)
    assert one_lost.loss == pytest.approx(2.005)
    (row,) = findings({"fixed 64": one_lost}, samples=6_400).rows
    assert row["shown_loss"].endswith(", 1 diverged")


def test_the_picture_is_drawn(tmp_path):
    """A PNG, whatever the variants."""
    draw({**FIXED, "adaptive": ended(2.0, 8.0)}, title="a title", path=tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path):
    """Its quick form runs a variant of each kind and leaves page, picture and figures."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.loss_at_equal_samples",
        "--task",
        "digits",
        "--quick",
        "--results",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "equal_samples_digits.json").read_text())
    variants = {row["variant"]: row for row in found["rows"]}
    assert set(variants) == {"fixed 256", "adaptive"}
    assert variants["fixed 256"]["last_batches"] == [256]
    assert all(0.01 < row["losses"][0] < 0.1 for row in variants.values())
    assert (tmp_path / "equal_samples_digits.md").read_text().startswith("# At equal samples")
    assert (tmp_path / "equal_samples_digits.png").exists()


def test_a_folder_that_is_not_there_is_refused_before_anything_runs(tmp_path):
    """One sentence, and the code of a wrong command line."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.loss_at_equal_samples",
        "--task",
        "digits",
        "--results",
        tmp_path / "no",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not a folder that exists" in done.stderr
