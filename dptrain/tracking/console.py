"""What a run shows on the console: a live view on a terminal, one line per logged step elsewhere; writes no file.

Both views take the rows of `metrics.jsonl` and `decisions.jsonl` (see jsonl.py). Text from outside (names, reasons,
warnings) is shown without secrets, with its control characters spelled out, and never read as markup. A stream that
breaks ends the view, not the run.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dptrain.tracking.redact import printable
from dptrain.tracking.row_text import (
    UNKNOWN,
    decision_text,
    duration,
    evaluation_figures,
    figure,
    integer,
    layout,
    learning_rate,
    noise_scale_text,
    number,
    spelled,
    step_time,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from dptrain.tracking.row_text import Row

_MEMORY = 0.1  # share of the run that speed and time left are averaged over
_PERCENT = 100


def make_view(
    *,
    max_samples: int,
    title: str,
    print_every_steps: int = 1,
    num_steps: int | None = None,
    stream: TextIO | None = None,
    level: float = 0.95,
) -> View:
    """Choose the live view where `stream` is a terminal that can show it, else the view of lines.

    Args:
        max_samples: length of the run in samples.
        title: what is trained; shown above the progress.
        print_every_steps: steps between two printed lines; the live view shows the newest step.
        num_steps: length of the run in steps, where the batch is constant.
        stream: where to write; None is standard output as it is now.
        level: level of the noise scale's interval, as the rows have it.
    """
    stream = sys.stdout if stream is None else stream
    if _is_capable_terminal(stream):
        from dptrain.tracking.live_view import LiveView  # rich takes 0.1 s to load, and a log file has no use for it

        return LiveView(stream=stream, max_samples=max_samples, title=title, level=level)
    return LineView(stream=stream, max_samples=max_samples, print_every_steps=print_every_steps, num_steps=num_steps)


class View(ABC):
    """What both views have in common. A context manager, so that the terminal is restored however the run ends."""

    def __init__(self, *, stream: TextIO, max_samples: int) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._max_samples = max_samples
        self._speed = Speed(memory_samples=_MEMORY * max_samples)
        self._broken = False

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


class LineView(View):
    """One line for each event; for files, pipes and terminals that cannot redraw."""

    def __init__(
        self, *, stream: TextIO, max_samples: int, print_every_steps: int = 1, num_steps: int | None = None
    ) -> None:
        super().__init__(stream=stream, max_samples=max_samples)
        self._every_steps = print_every_steps
        self._num_steps = num_steps
        self._is_first = True

    def update(self, row: Row) -> None:
        """Print a line for a train row if its step is to be printed; the first always is."""
        self._speed.add(row)
        if not self._is_first and (number(row, "step") or 0) % self._every_steps:
            return
        self._is_first = False
        mfu, dropped = number(row, "ledger/mfu"), number(row, "train/steps_dropped")
        parts = [
            f"step {integer(row, 'step')}{f'/{self._num_steps:,}' if self._num_steps else ''}",
            f"{integer(row, 'progress/samples')}/{self._max_samples:,} samples",
            f"loss {figure(row, 'train/loss')}",
            f"lr {learning_rate(row)}",
            f"batch {integer(row, 'batch/global')}{layout(row, ' ({}×{}×{})')}",
            f"noise scale {noise_scale_text(row)}",
            step_time(row),
            f"{self._speed.text} samples/s",
            f"mfu {_PERCENT * mfu:.0f} %" if mfu is not None else "",
            f"eta {duration(self._speed.time_left_s(self._max_samples))}",
            f"skipped {dropped:,.0f}" if dropped else "",
        ]
        self._line(*parts)

    def evaluation(self, row: Row) -> None:
        """Print a line for an eval row."""
        figures = (f"{name} {value}" for name, value in evaluation_figures(row))
        self._line(f"step {integer(row, 'step')}", *figures)

    def decision(self, row: Row) -> None:
        """Print a line for a decision."""
        self._line(f"step {integer(row, 'step')}", decision_text(row))

    def note(self, text: str) -> None:
        """Print a warning or a notice."""
        self._line(printable(text))

    def close(self) -> None:
        """Do nothing: each line was flushed."""

    def _line(self, *parts: str) -> None:
        shown = self._spelled(" | ".join(filter(None, parts)))
        self._draw(lambda: print(shown, file=self._stream, flush=True))


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


def _is_capable_terminal(stream: TextIO) -> bool:
    try:
        terminal = stream.isatty()
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False
    return terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
