"""Which view a run has on the console: live on a terminal that can redraw, one line per event elsewhere.

The views take the rows of `metrics.jsonl` and `decisions.jsonl` (see jsonl.py). Text from outside (names, reasons,
warnings) is shown without secrets, with its control characters spelled out, and never read as markup. A stream that
breaks ends the view, not the run.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from dptrain.tracking.redact import printable
from dptrain.tracking.row_text import (
    decision_text,
    duration,
    evaluation_figures,
    figure,
    integer,
    layout,
    learning_rate,
    noise_scale_text,
    number,
    step_time,
    tokens_text,
)
from dptrain.tracking.view import View

if TYPE_CHECKING:
    from dptrain.tracking.row_text import Row


def make_view(
    *,
    max_samples: int,
    title: str,
    print_every_steps: int = 1,
    num_steps: int | None = None,
    stream: TextIO | None = None,
    level: float = 0.95,
    style: str = "auto",
) -> View:
    """Choose the live view where `stream` is a terminal that can show it, else the view of lines; or JSON.

    Args:
        max_samples: length of the run in samples.
        title: what is trained and where; the first line, or above the progress.
        print_every_steps: steps between two printed lines; the live view shows the newest step.
        num_steps: length of the run in steps, where the batch is constant.
        stream: where to write; None is standard output as it is now.
        level: level of the noise scale's interval, as the rows have it.
        style: "auto", or "json" for one JSON object per line.
    """
    stream = sys.stdout if stream is None else stream
    if style == "json":
        from dptrain.tracking.json_view import JsonView

        return JsonView(stream=stream, max_samples=max_samples, print_every_steps=print_every_steps)
    if _is_capable_terminal(stream):
        from dptrain.tracking.live_view import LiveView  # rich takes 0.1 s to load, and a log file has no use for it

        return LiveView(stream=stream, max_samples=max_samples, title=title, level=level)
    view = LineView(stream=stream, max_samples=max_samples, print_every_steps=print_every_steps, num_steps=num_steps)
    view.note(title)
    return view


def _is_capable_terminal(stream: TextIO) -> bool:
    try:
        terminal = stream.isatty()
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False
    return terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


_PERCENT = 100


class LineView(View):
    """One line for each event; for files, pipes and terminals that cannot redraw."""

    def __init__(
        self, *, stream: TextIO, max_samples: int, print_every_steps: int = 1, num_steps: int | None = None
    ) -> None:
        super().__init__(stream=stream, max_samples=max_samples)
        self._every_steps = print_every_steps
        self._num_steps = num_steps
        self._is_first = True

    def takes(self, step: int) -> bool:
        """Whether a line for this step is printed."""
        return self._is_first or step % self._every_steps == 0

    def update(self, row: Row) -> None:
        """Print a line for a train row if its step is to be printed; the first always is."""
        self._speed.add(row)
        if not self._is_first and (number(row, "step") or 0) % self._every_steps:
            return
        self._is_first = False
        mfu, dropped = number(row, "ledger/mfu"), number(row, "train/steps_dropped")
        shape = layout(row, " ({}×{}×{})")
        parts = [
            f"step {integer(row, 'step')}{f'/{self._num_steps:,}' if self._num_steps else ''}",
            f"{integer(row, 'progress/samples')}/{self._max_samples:,} samples",
            tokens_text(row, "progress/tokens", "tokens"),
            f"loss {figure(row, 'train/loss')}",
            f"lr {learning_rate(row)}",
            f"batch {integer(row, 'batch/global')}{shape}{tokens_text(row, 'batch/tokens', 'tokens', ' = ')}",
            f"noise scale now {noise_scale_text(row)}" if "noise_scale/state" in row else "",
            step_time(row),
            f"{self._speed.text} samples/s",
            tokens_text(row, "throughput/tokens_per_sec", "tokens/s"),
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
