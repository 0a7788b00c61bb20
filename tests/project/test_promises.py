"""The pages that promise something, SECURITY.md and docs/reliability.md, promise only what a test shows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dptrain.cli.main import _EXIT_CODES
from dptrain.config.settings_file import setting_names
from dptrain.runtime.signals import EXIT_HUNG, EXIT_RESUMABLE

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("SECURITY.md", "docs/reliability.md")}
SECTIONS = {"A": 17, "B": 17, "C": 13, "D": 15, "E": 10, "F": 10, "G": 12, "H": 12}
"""Faults in each section of the list."""


def rows(page):
    """Yield the cells of each row that ends in the name of a test."""
    for line in PAGES[page].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"`tests/[\w/]+\.py::\w+`", cells[-1]):
            yield cells


@pytest.mark.parametrize("page", PAGES)
def test_each_promise_names_a_test_that_exists(page):
    """The file is there, and the function in it."""
    promises = list(rows(page))
    assert len(promises) > 10
    for promise in promises:
        path, _, function = promise[-1].strip("`").partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        assert function in names, promise


@pytest.mark.parametrize("page", PAGES)
def test_options_that_are_named_exist(page):
    """Each `--option` of a page is one of `dptrain train`, or of a command that is not ours."""
    options = {name.replace("-", "_") for name in re.findall(r"`--([\w.-]+)", PAGES[page])}
    assert options <= {*setting_names(), "resume", "config", "allow_fresh", "max_restarts", "version", "standalone"}


def test_every_fault_of_the_list_is_promised_or_left_out_by_name():
    """The rows of the table and of the decision on what is left out together are the whole list."""
    decision = (ROOT / "docs/decisions/0011-rows-left-out.md").read_text(encoding="utf-8")
    promised = {name for cells in rows("docs/reliability.md") for name in re.findall(r"\b[A-H]\d+\b", cells[0])}
    left_out = set(re.findall(r"^- ([A-H]\d+)", decision.split("**Tested under")[0], re.MULTILINE))
    everything = {f"{section}{number}" for section, count in SECTIONS.items() for number in range(1, count + 1)}
    assert promised | left_out == everything
    assert not promised & left_out


def test_exit_codes_are_those_of_the_command():
    """The table of codes has each that the command gives, and no other."""
    table = PAGES["docs/reliability.md"].split("## Exit codes")[1].split("## Faults")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert codes == {0, 1, EXIT_HUNG, EXIT_RESUMABLE} | {code for _, code in _EXIT_CODES}
