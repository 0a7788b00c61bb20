"""The console as one JSON object per line, for programs that collect the output of containers."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, TextIO

from dptrain.tracking.redact import printable
from dptrain.tracking.view import View

if TYPE_CHECKING:
    from dptrain.tracking.row_text import Row


class JsonView(View):
    """Writes `{"event": "train", …}`, and likewise `eval`, `decision` and `note`; ASCII alone.

    Args:
        stream: where to write.
        max_samples: length of the run in samples.
        print_every_steps: steps between two `train` lines.
    """

    def __init__(self, *, stream: TextIO, max_samples: int, print_every_steps: int) -> None:
        super().__init__(stream=stream, max_samples=max_samples)
        self._print_every_steps = print_every_steps

    def takes(self, step: int) -> bool:
        """Whether a row of this step is written: the first, and every so many steps."""
        return step == 1 or step % self._print_every_steps == 0

    def update(self, row: Row) -> None:
        """Write a train row where one is due."""
        if self.takes(int(row["step"] or 0)):
            self._write("train", row)

    def evaluation(self, row: Row) -> None:
        """Write an eval row."""
        self._write("eval", row)

    def decision(self, row: Row) -> None:
        """Write a decision."""
        self._write("decision", row)

    def note(self, text: str) -> None:
        """Write a warning or a notice."""
        self._write("note", {"text": text})

    def close(self) -> None:
        """Do nothing: each line is out when it is written."""

    def _write(self, event: str, row: Row) -> None:
        values = {
            key: printable(value) if isinstance(value, str) else value
            for key, value in row.items()
            if key != "kind" and not (isinstance(value, float) and not math.isfinite(value))
        }
        line = json.dumps({"event": event, **values}) + "\n"

        def write() -> None:
            self._stream.write(line)
            self._stream.flush()

        self._draw(write)
