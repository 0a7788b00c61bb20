"""Proves that every result page says what the JSON beside it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.result_tables import differences, figures_table, rows_table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PAGES = sorted(
    path
    for path in RESULTS.glob("*.md")
    if path.with_suffix(".json").exists() and "figures" in json.loads(path.with_suffix(".json").read_text("utf-8"))
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_page_and_json_are_of_one_run(page):
    """Each figure on the page is that of the JSON, to the digits that the page has, and none is missing."""
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert differences(page.read_text(encoding="utf-8"), found["figures"]) == []


def test_there_are_pages():
    """The folder is not empty, so the test above is about something."""
    assert len(PAGES) > 8


def test_a_page_of_another_run_is_found():
    """1.007 against 1.0276, a figure left out and one that is unknown are reported."""
    page = figures_table({"ratio": 1.007, "other": 2.0})
    assert differences(page, {"ratio": 1.0276, "count": 3.0}) == [
        "count is not on the page",
        "ratio: 1.007 on the page, 1.0276 in the JSON",
        "other is not in the JSON",
    ]
    assert (
        differences(figures_table({"ratio": 1.02763, "small": 2.2426e-14}), {"ratio": 1.02763, "small": 2.2426e-14})
        == []
    )


def test_rows_are_those_of_the_templates():
    """A row fills the template of each column."""
    assert (
        rows_table([{"a": 1.5, "b": "x"}], {"A": "{a:.2f}", "B": "{b}"}) == "| A | B |\n| --- | --- |\n| 1.50 | x |\n"
    )
