"""What a part of the GPU day found: one row for each check, appended to the record at once; figures ride on rows."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@dataclass(frozen=True)
class Report:
    """Takes the rows of one part.

    Attributes:
        path: the record, a JSON object a line.
        part: name of the part.
    """

    path: Path
    part: str

    def add(self, check: str, *, ok: bool, result: str, figures: Mapping[str, float] | None = None) -> None:
        """Append a row; what a killed part found before is kept."""
        row = {"part": self.part, "check": check, "ok": ok, "result": result, "figures": dict(figures or {})}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{'ok  ' if ok else 'FAIL'} {self.part}: {check}: {result}", flush=True)

    def guarded(self, check: str, action: Callable[[], Row]) -> None:
        """Add the row that the action returns (`ok`, `result`, perhaps `figures`), or how it failed."""
        try:
            self.add(check, **action())
        except Exception as error:  # noqa: BLE001 - one failure must not hide the other answers
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self.add(check, ok=False, result=f"{type(error).__name__} at {where}: {str(error).splitlines()[0][:300]}")
        finally:
            torch.compiler.reset()


def read_rows(path: Path) -> list[Row]:
    """Return all rows; a line that was torn by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
