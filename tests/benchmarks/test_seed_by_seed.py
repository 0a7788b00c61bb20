"""Variants as the command line names them, what is said of them seed by seed, and the quick form of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.seed_by_seed import Variant, findings
from benchmarks.targets.benchmark_case import benchmark_cases
from benchmarks.targets.timed_run import Finish, Mark

ROOT = Path(__file__).parents[2]
PYSOURCE = benchmark_cases(quick=False)["pysource"]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.seed_by_seed", "--task", "digits", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def finished(samples, seconds, loss, *, arrived=True):
    """A run of two evaluations, the last one at its end."""
    marks = [Mark(steps=1, samples=0, seconds=0, loss=3.0), Mark(steps=2, samples=samples, seconds=seconds, loss=loss)]
    return Finish(end=marks[-1] if arrived else None, reason="" if arrived else "lost", marks=marks, rows=[], step_s={})


def test_an_adaptive_variant_has_the_default_law_and_its_own_settings():
    """The rate is for the task's default batch, wherever the run starts; settings keep their kinds."""
    timed_run = Variant.from_text("adaptive:1024:0.008:min_gain=0.05,critical_ratio=2.0,law=goodput").timed_run(
        PYSOURCE, seed=3
    )
    assert timed_run.settings["global_batch_size"] == 1024
    assert timed_run.settings["seed"] == 3
    assert timed_run.settings["optimizer"]["reference_batch_size"] == PYSOURCE.default_batch
    control = timed_run.settings["control"]
    assert {name: control[name] for name in ("min_gain", "critical_ratio", "law")} == {
        "min_gain": 0.05,
        "critical_ratio": 2.0,
        "law": "goodput",
    }


def test_other_variants():
    """A fixed batch measures nothing; batches that are written down keep one rate."""
    fixed = Variant.from_text("fixed:64:0.008").timed_run(PYSOURCE, seed=1)
    assert fixed.settings["control"]["mode"] == "off"
    assert fixed.settings["optimizer"]["learning_rate"] == 0.008
    written = Variant.from_text("written:0=1024,4096=64:0.008").timed_run(PYSOURCE, seed=1)
    assert written.settings["control"]["schedule"] == "0:1024 4096:64"
    assert written.settings["optimizer"]["rule"] == "none"


@pytest.mark.parametrize(
    "text", ["", "fixed:64", "fixed:64:x", "best:64:0.1", "fixed:64:0.1:margin=1", "written:64:0.1"]
)
def test_what_is_no_variants_is_refused(text):
    """A typo ends the command before anything runs."""
    with pytest.raises(ValueError):  # noqa: PT011 - the command line words it
        Variant.from_text(text)


def test_variants_are_compared_seed_by_seed():
    """Ratios are medians of those of equal seeds, the loss is that at the samples of the first variant."""
    first = {1: finished(100, 10.0, 2.0), 2: finished(300, 10.0, 2.0), 3: finished(200, 20.0, 2.0)}
    other = {1: finished(200, 5.0, 1.0), 2: finished(600, 10.0, 2.4), 3: finished(200, 30.0, 2.1)}
    figures = findings(["a", "b"], [first, other], target=2.0).figures
    assert figures["seconds_ratio_2"] == 1.0
    assert figures["samples_ratio_2"] == 2.0
    assert figures["loss_gap_2"] == pytest.approx(0.1)  # of 0.0, 0.7 and 0.1
    assert figures["loss_spread"] == pytest.approx(0.34694, abs=1e-5)  # of 2, 3 − 1/3 and 2.5 after 100 samples


def test_a_run_that_does_not_arrive_counts_as_lost():
    """One of two seeds that was given up leaves no median, and is written as a gap, not as a number."""
    first = {1: finished(100, 10.0, 2.0), 2: finished(100, 10.0, 2.0)}
    other = {1: finished(50, 5.0, 2.0), 2: finished(90, 90.0, 2.5, arrived=False)}
    found = findings(["a", "b"], [first, other], target=2.0)
    assert set(found.figures) == {"loss_spread"}
    assert found.rows[1]["seconds_ratio"] == [0.5, None]
    assert found.rows[1]["loss_gap"] == [0.0, None]
    assert found.rows[1]["shown_seconds_ratio"] == "inf (0.5 to inf)"


def test_the_command():
    """Its quick form runs two variants with one seed, and tells which command it was."""
    variants = ["fixed:128:0.002", "adaptive:16:0.002:min_gain=0.05"]
    done = run("--quick", "--json", "-", *variants)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["command"]
        == f"python -m benchmarks.seed_by_seed --task digits --seeds 101-108 {' '.join(variants)} --quick"
    )
    assert found["figures"]["seconds_ratio_2"] > 0
    assert [row["seeds"] for row in found["rows"]] == [[101], [101]]
    assert "compared seed by seed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fixed:64:0.1"], "name another one"),
        (["fixed:64:0.1", "fast:64:0.1"], "'fast:64:0.1' is no variant, such as fixed:64:0.008"),
        (["fixed:64:0.1", "fixed:32:0.1", "--seeds", "9-3"], "'9-3' is not such as 101-108"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(arguments, said):
    """One sentence, and the code of a wrong command line."""
    done = run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
