"""Writes the tree of docs/architecture.md from the first line of each file: `python docs/tree.py` (`make tree`)."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree -->\n```\n", "```\n<!-- /tree -->"


def _first_line(path: Path) -> str:
    """Return the first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0].rstrip(".") if text else ""


def tree() -> str:
    """Return the tree of the package, one line a file, its folders with the sentence of their `__init__`."""
    rows = []
    package = ROOT / "dptrain"
    for folder in sorted({package, *(path.parent for path in package.rglob("__init__.py"))}):
        depth = len(folder.relative_to(package).parts)
        rows.append(("  " * depth + f"{folder.name}/", _first_line(folder / "__init__.py")))
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        rows += [("  " * (depth + 1) + path.name, _first_line(path)) for path in files]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {text}".rstrip() + "\n" for name, text in rows)


def page(old: str) -> str:
    """Return the page with its tree as the files have it."""
    head, rest = old.split(BEGIN)
    return f"{head}{BEGIN}{tree()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
