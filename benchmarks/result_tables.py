"""The tables of a result page, written from the JSON beside it, so that the two are of one run."""
# python -m benchmarks.result_tables PATH.json: writes PATH.md, or only the table of figures into it where there is one

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_FIGURE = re.compile(r"^\| `(\w+)` \| ([^|]+?) \|$", re.MULTILINE)
_TABLE = re.compile(r"^\| figure \| value \|\n\|---\|---\|\n(?:\| `\w+` \| [^|]+ \|\n)+", re.MULTILINE)


def figures_table(figures: Mapping[str, float]) -> str:
    """Return the table of the figures, four digits each."""
    lines = [f"| `{name}` | {value:.4g} |" for name, value in figures.items()]
    return "\n".join(["| figure | value |", "|---|---|", *lines]) + "\n"


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Return the table of the rows: head of a column → template of its cells, as a benchmark shows it."""
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines = [" | ".join(template.format_map(row) for template in columns.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in [*head, *lines])


def differences(page: str, figures: Mapping[str, float]) -> list[str]:
    """Return what a page says otherwise than its JSON, as far as the page's own digits go.

    Args:
        page: its text.
        figures: of the JSON.
    """
    shown = dict(_FIGURE.findall(page))
    found = [f"{name} is not on the page" for name in figures if name not in shown]
    for name, text in shown.items():
        if name not in figures:
            found.append(f"{name} is not in the JSON")
        elif _rounded(figures[name], like=text) != float(text.replace(",", "")):
            found.append(f"{name}: {text} on the page, {figures[name]:.6g} in the JSON")
    return found


def _rounded(value: float, *, like: str) -> float:
    digits = re.sub(r"e.*|[^0-9]", "", like).lstrip("0")
    return float(f"{value:.{max(len(digits), 1)}g}")


def plain_page(found: Mapping[str, Any], *, name: str) -> str:
    """Return a page with all that a benchmark wrote as JSON and nothing else.

    Args:
        found: the object.
        name: of its file.
    """
    of = found["environment"]
    versions = f"dptrain {of['dptrain']} on torch {of['torch']} and Python {of['python']}"
    paragraphs = [
        f"# {found['question']}",
        f"`{found['command']}`; the figures are those of [{name}]({name}).",
        f"{versions}, {of['cpu_count']} cores ({of['processor']}).",
        figures_table(found["figures"]).rstrip(),
        found["note"],
        rows_table(found["rows"], found["columns"]),
    ]
    return "\n\n".join(paragraphs)


def main() -> None:
    """Write one result's page, or the table of figures into the page that it has."""
    path = Path(sys.argv[1])
    found = json.loads(path.read_text(encoding="utf-8"))
    page = path.with_suffix(".md")
    if page.exists():
        table = figures_table(found["figures"])
        text = _TABLE.sub(lambda _: table, page.read_text(encoding="utf-8"), count=1)
    else:
        text = plain_page(found, name=path.name)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
