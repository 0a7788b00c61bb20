"""What the pages say of the tree is so, and their links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_every_file_stands_in_the_tree():
    """docs/architecture.md has one line for each file, its first one; `make tree` writes them."""
    tree = runpy.run_path(str(ROOT / "docs" / "tree.py"))
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert tree["page"](text) == text, "run `make tree`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    """Every relative link of a page leads somewhere."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []
