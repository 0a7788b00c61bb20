"""The quick form of `benchmarks.overhead`, run as its reader would run it, and how its figures are made."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.overhead import __main__ as overhead
from benchmarks.overhead import cases, peers, variants

ROOT = Path(__file__).parents[3]
OURS = {"default", "every=1, parameters", "every=1, hook"}
FIGURES = {
    "default_ratio_max",
    "default_ratio_error",
    "floor_ratio",
    "every_step_ratio",
    "every_step_error",
    "every_step_hook_ratio",
}


@pytest.fixture(scope="module")
def result():
    command = [sys.executable, "-m", "benchmarks.overhead", "--quick", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_figures_are_there(result):
    """Each figure is a ratio of times; the peers' are there exactly where they are installed."""
    present = {row["variant"] for row in result["rows"] if "absent" not in row}
    installed = {f"peer_{name}_ratio" for name in peers.PEERS if f"peer {name}" in present}
    assert set(result["figures"]) == FIGURES | installed | ({"best_peer_ratio"} if installed else set())
    assert all(0.1 < ratio < 10 for name, ratio in result["figures"].items() if "ratio" in name and "error" not in name)


def test_every_variants_has_a_row_in_every_case(result):
    """Under DDP all of ours, the floor and each peer, present or absent with its reason; in one process no hooks."""
    wrapped = {row["variant"] for row in result["rows"] if row["case"] == "2M light"}
    alone = {row["variant"] for row in result["rows"] if row["case"] == "2M accumulation"}
    assert wrapped == OURS | {"bare again"} | {f"peer {name}" for name in peers.PEERS}
    assert alone == {"bare again", "default", "every=1, parameters"}
    assert all(row["absent"] for row in result["rows"] if row["num_rounds"] == 0)


def test_rows_hold_what_a_ratio_needs_to_be_judged(result):
    """Beside each ratio stand what chance leaves of it, the floor of its case and how often was measured."""
    for row in result["rows"]:
        if "absent" in row:
            continue
        assert row["ratio_quartile_1"] <= row["ratio_quartile_3"]
        assert row["num_parameters"] == pytest.approx(2e6, rel=0.1)
        assert min(row["ratio_error"], row["bare_step_s"], row["floor_ratio"], row["cpu_ratio"]) >= 0
        assert row["every"] == 1 or row["variant"] == "default"
    (floor,) = [row for row in result["rows"] if row["case"] == "2M light" and row["variant"] == "bare again"]
    assert floor["ratio"] == floor["floor_ratio"]


def turn(seconds, *, measured=False):
    return variants.Turn(wall_s=seconds, cpu_s=seconds, measured=measured)


def test_ratios_are_taken_within_a_round():
    """A machine that slows down to a tenth between rounds changes no ratio, and a resting variant none either."""
    turns = {
        "bare": [turn(1.0), turn(10.0), turn(1.0)],
        "bare again": [turn(1.0), turn(10.0), turn(3.0)],
        "x": [turn(1.5), turn(15.0), None],
    }
    ratio = variants._Ratio.of("x", turns=turns, seconds=lambda turn: turn.wall_s)
    assert (ratio.median, ratio.error, ratio.num_rounds) == (1.5, 0, 2)
    assert variants._Ratio.of("bare again", turns=turns, seconds=lambda turn: turn.wall_s).median == 1


def test_steps_that_are_measured_count_by_their_share():
    """Timed as often as the others, but one of four when left alone: a step of double the time makes it 1.25."""
    bare = [turn(1.0)] * 8
    turns = {"bare": bare, "bare again": bare, "x": [turn(2.0, measured=True), turn(1.0)] * 4}
    ratio = variants._Ratio.of("x", turns=turns, every=4, seconds=lambda turn: turn.wall_s)
    assert (ratio.median, ratio.error, ratio.num_rounds) == (1.25, 0, 8)


def test_the_step_before_a_measured_one_counts_by_its_share():
    """Hooks are put on at its end: half a step more, once in ten steps, and a step more for the measured one: 1.15."""
    bare = [turn(1.0)] * 16
    turns = {"bare": bare, "bare again": bare, "x": [turn(2.0, measured=True), turn(1), turn(1), turn(1.5)] * 4}
    ratio = variants._Ratio.of("x", turns=turns, every=10, seconds=lambda turn: turn.wall_s)
    assert ratio.median == pytest.approx(1.15)


@pytest.mark.parametrize(
    ("num_rounds", "passed_s", "error", "met"),
    [
        (3, 500, 0, False),
        (16, 39, 0, False),
        (16, 41, 0.1, False),
        (17, 41, 0, False),
        (16, 41, 0, True),
        (5, 601, 1, True),
    ],
)
def test_a_case_goes_on_until_its_error_is_small(num_rounds, passed_s, error, met):
    """After the least time, until the ratio of the default is known well enough or the most time is over."""
    limits = variants.Limits(seconds=40, error=0.01, longest_s=600)
    assert limits.are_met(num_rounds, passed_s, lambda: error) == met
    assert variants.Limits(seconds=40).are_met(num_rounds, passed_s, lambda: error) == (
        num_rounds > 3 and passed_s > 40
    )


def row(case, variant, ratio):
    return {"case": case, "variant": variant, "ratio": ratio, "ratio_error": 0.001}


@pytest.mark.parametrize(("default", "verdict"), [(1.005, "held"), (1.011, "not distinguishable"), (1.02, "BROKEN")])
def test_figures_are_the_worst_of_ours_and_the_best_of_the_peers(default, verdict):
    """The default is judged at its worst model, the floor by its distance from 1, peers where `every=1` is."""
    names = [("every=1, parameters", 1.01), ("every=1, hook", 1.02), ("peer adaptdl", 1.5), ("peer adascale", 1.1)]
    rows = [row("2M light", "bare again", 0.98), row("12M heavy", "bare again", 1.01)]
    rows += [row("2M light", "default", default), row("12M heavy", "default", 1.001)]
    rows += [row("12M heavy", *named) for named in names] + [row("2M light", "peer adascale", 1.0)]
    found = overhead.findings(rows, quick=False)
    assert found.figures == {
        "default_ratio_max": default,
        "default_ratio_error": 0.001,
        "every_step_error": 0.001,
        "floor_ratio": 0.98,
        "every_step_ratio": 1.01,
        "every_step_hook_ratio": 1.02,
        "best_peer_ratio": 1.1,
        "peer_adaptdl_ratio": 1.5,
        "peer_adascale_ratio": 1.1,
    }
    assert f"default up to 1.01: {verdict}" in found.note
    assert "below every peer there: held" in found.note


def test_models_have_the_sizes_that_they_are_named_after():
    """The full form asks 2, 12 and 50 million parameters with light and heavy steps, and accumulation alone."""
    names = {case.name for case in cases.CASES}
    assert names == {f"{size} {step}" for size in ("2M", "12M", "50M") for step in ("light", "heavy")} | {
        "2M accumulation"
    }
    for case in cases.CASES:
        num_parameters = case.num_blocks * 12 * case.width**2
        assert math.isclose(num_parameters, float(case.parameters.removesuffix("M")) * 1e6, rel_tol=0.1)
