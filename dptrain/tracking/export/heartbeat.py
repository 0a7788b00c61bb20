"""A file that shows that a run is alive: rewritten while it trains, removed at its end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from dptrain.tracking.jsonl import Value

_EVERY_S = 5.0  # a health check asks for minutes; a write to a file server takes milliseconds


class Heartbeat:
    """Writes pid, time, step and samples into a file, at most every 5 s.

    The training loop itself writes it, so a run that hangs leaves an old file.

    Args:
        path: the file; its folder exists.
    """

    name = "the heartbeat"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next_s = 0.0

    def is_due(self) -> bool:
        """Whether the file is to be rewritten."""
        return time.monotonic() >= self._next_s

    def update(self, row: Mapping[str, Value]) -> None:
        """Rewrite the file where it is due.

        Raises:
            OSError: where the disk does not take it.
        """
        if not self.is_due():
            return
        self._next_s = time.monotonic() + _EVERY_S
        record = {
            "time": time.time(),
            "pid": os.getpid(),
            "step": row.get("step"),
            "samples": row.get("progress/samples"),
        }
        write_whole(self._path, json.dumps(record) + "\n", mode=0o600)  # as all files of a run folder

    def close(self) -> None:
        """Remove the file: a run that has ended is not one that hangs."""
        self._path.unlink(missing_ok=True)


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Replace a file in one step, so that a reader never sees half of it; the umask narrows `mode`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)
