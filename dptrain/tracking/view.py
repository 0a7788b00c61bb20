"""What all views of a run have in common: rows in, a stream that may break, speed and time left."""

from __future__ import annotations

import contextlib
import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dptrain.tracking.row_text import UNKNOWN, number, spelled

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from dptrain.tracking.row_text import Row

_MEMORY = 0.1  # share of the run that speed and time left are averaged over


class View(ABC):
    """What both views have in common. A context manager, so that the terminal is restored however the run ends."""

    def __init__(self, *, stream: TextIO, max_samples: int) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._max_samples = max_samples
        self._speed = Speed(memory_samples=_MEMORY * max_samples)
        self._broken = False

    @abstractmethod
    def takes(self, step: int) -> bool:
        """Whether a train row of this step would be seen."""

    @abstractmethod
    def update(self, row: Row) -> None:
        """Show a train row."""

    @abstractmethod
    def evaluation(self, row: Row) -> None:
        """Show an eval row."""

    @abstractmethod
    def decision(self, row: Row) -> None:
        """Show a row of `decisions.jsonl`, to stay."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Show a warning or a notice, to stay."""

    @abstractmethod
    def close(self) -> None:
        """Leave the last state on the screen and release the terminal. Calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _spelled(self, text: str) -> str:
        """Return a text with what the stream's encoding has for each character."""
        return spelled(text, self._encoding)

    def _draw(self, action: Callable[[], object]) -> None:
        """Run an action that writes to the stream; if it fails, stop drawing for good.

        OSError is a closed pipe, a lost terminal or a full disk; ValueError is a stream that was closed in Python.
        """
        if self._broken:
            return
        try:
            action()
        except (OSError, ValueError):
            self._broken = True
            self._give_up()

    def _give_up(self) -> None:
        # The stream's buffer would fail to flush once more when the interpreter ends, and change the exit code.
        with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


class Speed:
    """Samples per second, averaged over the last tenth of the run.

    A single pause hardly changes it. The time left also counts evaluations and checkpoints.
    """

    def __init__(self, *, memory_samples: float) -> None:
        self._memory_samples = max(memory_samples, 1.0)
        self._last: tuple[float, float] | None = None
        self._samples = self._training_s = 0.0  # decayed sums, for the speed while training
        self._wall_samples = self._wall_s = 0.0  # the same with the time between steps, for the time left

    def add(self, row: Row) -> None:
        """Take in a train row."""
        done, wall_s = number(row, "progress/samples") or 0.0, number(row, "progress/wall_s") or 0.0
        batch, speed = number(row, "batch/global") or 0.0, number(row, "throughput/samples_per_sec") or 0.0
        last_done, last_wall_s = self._last or (done - batch, wall_s)
        samples = max(done - last_done, 0.0)
        keep = math.exp(-samples / self._memory_samples)
        if speed > 0:
            self._samples = keep * self._samples + samples
            self._training_s = keep * self._training_s + samples / speed
        if wall_s > last_wall_s:
            self._wall_samples = keep * self._wall_samples + samples
            self._wall_s = keep * self._wall_s + wall_s - last_wall_s
        self._last = done, wall_s

    @property
    def text(self) -> str:
        """The speed in samples per second, as it is shown; a dash before it is known."""
        return f"{self.samples_per_s:,.0f}" if self.samples_per_s else UNKNOWN

    @property
    def samples_per_s(self) -> float:
        """Samples per second while training; 0 before it is known."""
        return self._samples / self._training_s if self._training_s else 0.0

    def time_left_s(self, max_samples: int) -> float | None:
        """Return the seconds to the end of the run at the speed so far; None before it is known."""
        speed = self._wall_samples / self._wall_s if self._wall_s else self.samples_per_s
        return max(max_samples - self._last[0], 0.0) / speed if self._last and speed else None
