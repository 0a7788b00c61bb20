"""The live view of a run: a few lines at the foot of a terminal, redrawn in place; events are printed above them."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

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
    tokens_text,
)
from dptrain.tracking.view import View

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import ConsoleOptions

    from dptrain.tracking.row_text import Row

_REFRESH_S = 0.25
_DRAWING_SHARE = 0.01  # of the time, however slow the terminal is
_LOSS_MEMORY = 0.9  # weight of the past in the loss that is shown: some ten log steps
_PERCENT = 100


class LiveView(View):
    """A few lines at the foot of the terminal, redrawn at most four times a second; events are printed above.

    It redraws inside the calls, not from a thread of its own: a thread would compete with the training loop for the
    interpreter, and leave its lock held in each data-loader process that is forked.
    """

    def __init__(self, *, stream: TextIO, max_samples: int, title: str, level: float = 0.95) -> None:
        super().__init__(stream=stream, max_samples=max_samples)
        self._title = self._spelled(printable(title))
        self._level = level
        self._row: Row = {}
        self._losses: Row = {}
        self._evaluation: Row = {}
        self._due_at = -math.inf
        self._console = _EnduringConsole(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._picture = _Picture(self._parts)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            get_renderable=lambda: self._picture,
            # What the task prints goes above the view, but a stream that leads elsewhere is left alone.
            redirect_stdout=sys.stdout is stream,
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )
        self._draw(self._live.start)

    def takes(self, step: int) -> bool:  # noqa: ARG002 - the newest row, whichever it is
        """Whether a redraw is due."""
        return time.monotonic() >= self._due_at

    def update(self, row: Row) -> None:
        """Show a train row; costs microseconds unless a redraw is due."""
        self._speed.add(row)
        self._row = row
        self._losses = _smoothed(row, before=self._losses)
        begun = time.monotonic()
        if begun >= self._due_at:
            self._draw(self._redraw)
            now = time.monotonic()
            self._due_at = now + max(_REFRESH_S, (now - begun) / _DRAWING_SHARE)

    def evaluation(self, row: Row) -> None:
        """Show an eval row in the table."""
        self._evaluation = row
        self._draw(self._redraw)

    def decision(self, row: Row) -> None:
        """Print a decision above the table."""
        self._above(
            Text(f"step {integer(row, 'step')}", style="dim"), Text(self._spelled(decision_text(row)), style="cyan")
        )

    def note(self, text: str) -> None:
        """Print a warning or a notice above the table."""
        self._above(Text(self._spelled(printable(text)), style="yellow"))

    def close(self) -> None:
        """Draw once more and show the cursor again."""
        self._draw(self._fit_to_width)
        self._draw(self._live.stop)

    def _give_up(self) -> None:
        super()._give_up()
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()  # gives sys.stdout back

    def _redraw(self) -> None:
        self._fit_to_width()
        self._live.refresh()

    def _fit_to_width(self) -> None:
        """After the terminal became narrower, have all rows erased that the last drawing takes now.

        A terminal wraps lines that no longer fit, so the drawing has more rows than rich has counted.
        """
        rows = self._picture.rows_at(self._console.width)
        shape = self._live._live_render._shape  # noqa: SLF001 - rich has no other way to say how much is to be erased
        if shape is not None and rows > shape[1]:
            self._live._live_render._shape = (shape[0], rows)  # noqa: SLF001 - as above

    def _above(self, *parts: Text) -> None:
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(*parts)
        self._draw(self._fit_to_width)
        self._draw(lambda: self._console.print(line))

    def _parts(self) -> Group:
        return Group("", Text(self._title, style="bold", overflow="fold"), self._progress(), self._figures())

    def _progress(self) -> Table:
        done = number(self._row, "progress/samples") or 0.0
        line = Table.grid(expand=True, padding=(0, 2, 0, 0))
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True)
        line.add_row(
            ProgressBar(total=max(self._max_samples, 1), completed=min(done, self._max_samples)),
            f"{done:,.0f}/{self._max_samples:,} samples",
            Text(self._spelled(f"eta {duration(self._speed.time_left_s(self._max_samples))}"), style="bold"),
        )
        return line

    def _figures(self) -> Text:
        row = self._row
        skipped = number(row, "train/steps_dropped") or 0
        shape = layout(row, " = {} micro-batch × {} accumulation × {} replicas")
        lines = [
            ("training loss", figure(self._losses, "train/loss")),
            *evaluation_figures(self._evaluation),
            (
                "global batch",
                f"{integer(row, 'batch/global')}{shape}{tokens_text(row, 'batch/tokens', 'tokens', ' = ')}",
            ),
            (f"noise scale, {_PERCENT * self._level:g} %", noise_scale_text(row)),
            ("learning rate", learning_rate(row)),
            (
                "throughput",
                f"{self._speed.text} samples/s{tokens_text(row, 'throughput/tokens_per_sec', 'tokens/s', ' = ')}",
            ),
            ("steps", f"{integer(row, 'step')}{f', {skipped:,.0f} skipped' if skipped else ''}"),
        ]
        width = max(len(name) for name, _ in lines) + 2
        # Not a table: this is drawn often, and a table costs twice the time.
        parts = [
            ((f"{name:<{width}}", "dim"), (f"{self._spelled(value)}\n", _style(name, skipped=bool(skipped))))
            for name, value in lines
        ]
        return Text.assemble(*(part for pair in parts for part in pair), end="")


def _style(name: str, *, skipped: bool) -> str:
    if name.startswith("noise scale"):
        return "bold"
    return "red" if name == "steps" and skipped else ""


class _Picture:
    """What is drawn, and how wide each of its lines was the last time."""

    def __init__(self, parts: object) -> None:
        self._parts = parts
        self._widths: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        lines = console.render_lines(self._parts(), options, pad=False)  # type: ignore[operator]
        self._widths = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()

    def rows_at(self, width: int) -> int:
        """Return the rows that the last drawing takes in a terminal of this width."""
        return sum(max(1, -(-line // max(width, 1))) for line in self._widths)


class _EnduringConsole(Console):
    def on_broken_pipe(self) -> None:
        """Let the error through to `View._draw`: rich would end the process, dptrain continues training."""
        raise  # noqa: PLE0704 - rich calls this while it handles the error


def _smoothed(row: Row, *, before: Row) -> Row:
    """Average the training loss over some ten rows; one that is not finite shows as it is."""
    loss, average = number(row, "train/loss"), number(before, "train/loss")
    if loss is None or average is None:
        return {"train/loss": row.get("train/loss")}
    return {"train/loss": _LOSS_MEMORY * average + (1 - _LOSS_MEMORY) * loss}
