"""The view of a run in a file or a pipe: one line for each logged step, evaluation, decision and warning."""

from __future__ import annotations

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
)
from dptrain.tracking.view import View

if TYPE_CHECKING:
    from dptrain.tracking.row_text import Row

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
        parts = [
            f"step {integer(row, 'step')}{f'/{self._num_steps:,}' if self._num_steps else ''}",
            f"{integer(row, 'progress/samples')}/{self._max_samples:,} samples",
            f"loss {figure(row, 'train/loss')}",
            f"lr {learning_rate(row)}",
            f"batch {integer(row, 'batch/global')}{layout(row, ' ({}×{}×{})')}",
            f"noise scale now {noise_scale_text(row)}",
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
