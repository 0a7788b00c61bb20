"""What a sweep tells: rows, files, fits."""

from __future__ import annotations

import csv
import json
import math
import sys

import numpy as np
import pytest

from dptrain.explain.model.frontier import Verdict
from dptrain.sweep import (
    COLUMNS,
    Course,
    SweepSpec,
    fits_record,
    outcomes,
    search,
    table,
    write_csv,
    write_parquet,
)

BATCHES = [4, 16, 64, 256]


def course(batch, *, seed=0, early=False):
    """Steps to the loss 0.1 are those of a hyperbola, S_min = 40 and B_crit = 32."""
    samples = 40 * (batch + 32) * math.exp(0.02 * (seed - 0.5)) / math.log(10)
    positions = np.arange(1, 400) * samples / (1 if early else 40)
    return Course(positions=positions.tolist(), losses=np.exp(-positions / samples).tolist(), is_over=True)


@pytest.fixture
def swept():
    spec = SweepSpec(
        batch_sizes=BATCHES,
        targets=[0.4, 0.1],
        seeds=[0, 1],
        learning_rates=[0.5],
        base_batch_size=4,
        base_learning_rate=0.5,
        base_samples=10_000,
        exponent=0.5,
    )
    courses = {spec.run(b, grid_point=0, seed=s): course(b, seed=s, early=b == 4) for b in BATCHES for s in (0, 1)}
    searches = [search(spec, batch, courses.__getitem__) for batch in BATCHES]
    clock = (np.array([0.0, 1e6]), np.array([0.0, 1e3]))
    rows = list(table(spec, searches, course_of=courses.__getitem__, clock_of=lambda _: clock))
    return spec, searches, rows


def test_one_row_for_each_run_and_target(swept):
    """In order, with steps that are samples over the batch and seconds by the run's own clock."""
    spec, _, rows = swept
    assert [(r.global_batch_size, r.seed, r.target) for r in rows] == [
        (b, s, t) for b in BATCHES for s in (0, 1) for t in spec.targets
    ]
    known = [row for row in rows if row.steps is not None]
    assert all(row.steps == pytest.approx(row.samples / row.global_batch_size) for row in known)
    assert all(row.seconds == pytest.approx(row.samples / 1000) for row in known)
    assert {row.status for row in rows} == {"done"}


def test_what_was_there_before_the_first_look_has_no_steps(swept):
    """It is reached; and its batch is left out of the fit and named."""
    spec, searches, rows = swept
    early = [row for row in rows if row.steps is None]
    assert {(row.global_batch_size, row.target, row.reached) for row in early} == {(4, 0.4, True)}
    easy, hard = outcomes(spec, rows, searches)
    assert (list(easy.early), list(hard.early)) == ([4], [])
    assert easy.frontier.num_batches == 3
    assert hard.frontier.num_batches == 4


def test_the_frontier_of_each_target_is_fitted(swept):
    """S_min and B_crit are those of the runs; the rate of each batch stands beside it, and that it is the only one."""
    spec, searches, rows = swept
    _, hard = outcomes(spec, rows, searches)
    assert hard.frontier.verdict is Verdict.HYPERBOLA
    assert hard.frontier.min_steps.value == pytest.approx(40, rel=0.01)
    assert hard.frontier.critical_batch_size.value == pytest.approx(32, rel=0.01)
    assert hard.rates == dict.fromkeys(BATCHES, 0.5)
    assert list(hard.at_edge) == BATCHES
    assert hard.sentence == str(hard.frontier)


def test_two_batches_are_reported_to_be_too_few(swept):
    """The rest of what was asked for is printed all the same."""
    spec, searches, rows = swept
    few = [row for row in rows if row.global_batch_size < 64]
    _, hard = outcomes(spec, few, searches)
    assert hard.frontier is None
    assert "3 batches or more, got 4, 16" in hard.sentence


def test_a_csv_file_is_tidy(swept, tmp_path):
    """A name for each column, nothing for what is missing, true and false."""
    write_csv(tmp_path / "table.csv", swept[2])
    with (tmp_path / "table.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS
    assert len(found) == len(swept[2])
    assert [row["steps"] == "" for row in found] == [row.steps is None for row in swept[2]]
    assert {row["reached"] for row in found} == {"true"}
    assert float(found[-1]["steps"]) == swept[2][-1].steps


def test_a_parquet_file_has_types(swept, tmp_path):
    """Whole numbers, truths and missing values come back as they were."""
    parquet = pytest.importorskip("pyarrow.parquet")
    assert write_parquet(tmp_path / "table.parquet", swept[2])
    found = parquet.read_table(tmp_path / "table.parquet").to_pylist()
    assert found == [{name: getattr(row, name) for name in COLUMNS} for row in swept[2]]


def test_without_pyarrow_there_is_no_parquet(swept, tmp_path, monkeypatch):
    """And that is no error."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not write_parquet(tmp_path / "table.parquet", swept[2])
    assert list(tmp_path.iterdir()) == []


def test_the_record_of_the_fits_is_json(swept):
    """With null for what is open, and the batches as names."""
    spec, searches, rows = swept
    record = json.loads(json.dumps(fits_record(outcomes(spec, rows, searches)), allow_nan=False))
    hard = record["targets"][1]
    assert hard["target"] == 0.1
    assert hard["rates"] == {str(batch): 0.5 for batch in BATCHES}
    assert hard["frontier"]["min_steps"]["value"] == pytest.approx(40, rel=0.01)
    assert hard["frontier"]["verdict"] == "hyperbola"
