"""Proves that every result page says what the JSON beside it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.result_tables import differences, figures_table, main, rows_table

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


def test_a_page_is_written_where_there_is_none_and_else_keeps_its_words(monkeypatch, tmp_path):
    """From the JSON alone, rows and note too; on a page that somebody has written only the table is new."""
    path, page = tmp_path / "example.json", tmp_path / "example.md"
    environment = {"dptrain": "1", "torch": "2", "python": "3", "cpu_count": 2, "processor": "X", "device": "cpu"}
    found = {"question": "Is it?", "command": "python -m it", "environment": environment, "figures": {"ratio": 1.25}}
    found |= {"columns": {"time": "{seconds:.2f} s"}, "rows": [{"seconds": 2.0}], "note": "A note."}
    monkeypatch.setattr(sys, "argv", ["x", str(path)])
    path.write_text(json.dumps(found))
    main()
    written = page.read_text()
    for text in ("# Is it?", "`python -m it`", "| `ratio` | 1.25 |", "| 2.00 s |", "A note."):
        assert text in written
    page.write_text(written.replace("A note.", "Words."))
    path.write_text(json.dumps({**found, "figures": {"ratio": 2.5}}))
    main()
    assert page.read_text() == written.replace("A note.", "Words.").replace("| 1.25 |", "| 2.5 |")
