"""SECURITY.md promises only what a test shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def promises():
    """Return the rows of the table of promises: sentence and test."""
    table = TEXT.split("## What we promise")[1].split("\n\n")[1]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def test_each_promise_names_a_test_that_exists():
    """The file is there, and the function in it."""
    rows = promises()
    assert rows
    for sentence, test in rows:
        path, _, function = test.strip("`").partition("::")
        source = (ROOT / path).read_text(encoding="utf-8")
        names = [node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        assert function in names, sentence


def test_what_the_page_sends_to_exists():
    """Each file and each option that it names is there."""
    from dptrain.train.settings_file import setting_names

    assert (ROOT / "constraints.txt").exists()
    options = set(re.findall(r"`--([\w.]+)", TEXT)) - {"version"}
    assert options <= {*setting_names(), "resume", "config"}
