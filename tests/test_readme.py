"""The README says of each file what lives there, and shows only files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def tree():
    """Return the paths under dptrain/ that the README's tree lists."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- tree -->")[1].split("<!-- /tree -->")[0]
    found, folder = [], ""
    for line in block.splitlines():
        if match := re.match(r"^(?P<indent> *)(?P<name>[\w./]+)(?:\s\s+\S|$)", line):
            name = match["name"]
            if name.endswith("/"):
                folder = name if match["indent"] == "" else f"dptrain/{name}"
            else:
                found.append((folder if match["indent"] == "    " else "dptrain/") + name)
    return found


def test_every_file_stands_in_the_tree_once():
    """A file that is added, moved or deleted changes the README in the same commit."""
    files = {
        str(path.relative_to(ROOT)) for path in (ROOT / "dptrain").rglob("*.py") if "__pycache__" not in path.parts
    }
    listed = tree()
    assert len(listed) == len(set(listed))
    shown_by_their_folder = {name for name in files if name.endswith("/__init__.py") and name.count("/") > 1}
    assert set(listed) == files - shown_by_their_folder


def test_links_and_pictures_exist():
    """Every relative link of the README leads somewhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
