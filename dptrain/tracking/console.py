"""What a person sees of a run: a live view on a terminal, one plain line per log step elsewhere; no file is written.

Both views take the rows of `metrics.jsonl` and `decisions.jsonl` (see metrics.py). Text from outside (names, reasons,
warnings) is shown without secrets, with its control characters spelled out, and never read as markup. A stream that
breaks ends the view, not the run.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dptrain.tracking.redact import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    from dptrain.tracking.jsonl import Value

    Row = Mapping[str, Value]

_REFRESH_S = 0.25
_DRAWING_SHARE = 0.01  # of the time, however slow the terminal is
_LOSS_MEMORY = 0.9  # weight of the past in the loss that the live view shows: some ten log steps
_PACE_MEMORY = 0.1  # share of the run that speed and time left are averaged over
_TITLE_WIDTH = 24
_NOTHING = "–"
_SMALL, _LARGE = 1e-2, 1e5  # figures between them read well without an exponent
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_TWO_DIGITS = 9.95  # what rounds to 10


def make_view(
    *, max_samples: int, title: str, print_every_steps: int = 1, stream: TextIO | None = None, level: float = 0.95
) -> View:
    """Choose the live view where `stream` is a terminal that can show it, else the plain one.

    Args:
        max_samples: length of the run in samples.
        title: what is trained; shown beside the progress.
        print_every_steps: steps between two lines of the plain view; the live view shows what is newest.
        stream: where to write; None is standard output as it is now.
        level: level of the noise scale's interval, as the rows have it.
    """
    stream = sys.stdout if stream is None else stream
    if _is_capable_terminal(stream):
        return LiveView(stream=stream, max_samples=max_samples, title=title, level=level)
    return PlainView(stream=stream, max_samples=max_samples, print_every_steps=print_every_steps)


class View(ABC):
    """What both views have in common. A context manager, so that the terminal is restored however the run ends."""

    def __init__(self, *, stream: TextIO, max_samples: int) -> None:
        self._stream = stream
        self._max_samples = max_samples
        self._pace = _Pace(memory_samples=_PACE_MEMORY * max_samples)
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
        """Leave the last state on the screen and give the terminal back. Calling it again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _draw(self, action: Callable[[], object]) -> None:
        """Run what writes to the stream; where that breaks, stop drawing for good.

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
        # What the stream still buffers would fail once more when the interpreter ends, and spoil the exit code.
        with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


class PlainView(View):
    """One line for each thing that happens; for files, pipes and terminals that cannot redraw."""

    def __init__(self, *, stream: TextIO, max_samples: int, print_every_steps: int = 1) -> None:
        super().__init__(stream=stream, max_samples=max_samples)
        self._every_steps = print_every_steps
        self._is_first = True

    def update(self, row: Row) -> None:
        """Show a train row, one line, where its step is to be printed; the first always is."""
        self._pace.add(row)
        if not self._is_first and (_number(row, "step") or 0) % self._every_steps:
            return
        self._is_first = False
        parts = [
            f"step {_integer(row, 'step')}",
            f"samples {_integer(row, 'progress/samples')}/{self._max_samples:,}",
            f"loss {_figure(row, 'train/loss')}",
            f"batch {_integer(row, 'batch/global')}{_layout(row, ' ({}×{}×{})')}",
            f"noise scale {noise_scale_text(row)}",
            f"lr {_learning_rate(row)}",
            f"{self._pace.text} samples/s",
            f"left {_duration(self._pace.time_left_s(self._max_samples))}",
        ]
        if dropped := _number(row, "train/steps_dropped"):
            parts.append(f"dropped {dropped:,.0f}")
        self._line("  ".join(parts))

    def evaluation(self, row: Row) -> None:
        """Show an eval row, one line."""
        figures = "  ".join(f"{name} {value}" for name, value in _evaluation_figures(row))
        self._line(f"step {_integer(row, 'step')}  {figures}")

    def decision(self, row: Row) -> None:
        """Show a decision, one line."""
        self._line(f"step {_integer(row, 'step')}  {decision_text(row)}")

    def note(self, text: str) -> None:
        """Show a warning or a notice, one line."""
        self._line(printable(text))

    def close(self) -> None:
        """Do nothing: each line was flushed."""

    def _line(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = text.encode(encoding, "replace").decode(encoding)
        self._draw(lambda: print(shown, file=self._stream, flush=True))


class LiveView(View):
    """A few lines at the foot of the terminal, redrawn at most four times a second; what stays is printed above.

    It redraws inside the calls, not from a thread of its own: that would take turns with the training loop for the
    interpreter, and leave its lock behind in each data-loader process that is forked.
    """

    def __init__(self, *, stream: TextIO, max_samples: int, title: str, level: float = 0.95) -> None:
        super().__init__(stream=stream, max_samples=max_samples)
        self._title = printable(title)
        self._level = level
        self._row: Row = {}
        self._losses: Row = {}
        self._evaluation: Row = {}
        self._due_at = -math.inf
        self._console = _EnduringConsole(file=stream, force_terminal=True, highlight=False, markup=False, emoji=False)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            get_renderable=self._picture,
            # What the task prints goes above the view, but a stream that leads elsewhere is left alone.
            redirect_stdout=sys.stdout is stream,
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )
        self._draw(self._live.start)

    def update(self, row: Row) -> None:
        """Show a train row; costs microseconds unless a redraw is due."""
        self._pace.add(row)
        self._row = row
        self._losses = _smoothed(row, before=self._losses)
        begun = time.monotonic()
        if begun >= self._due_at:
            self._draw(self._live.refresh)
            now = time.monotonic()
            self._due_at = now + max(_REFRESH_S, (now - begun) / _DRAWING_SHARE)

    def evaluation(self, row: Row) -> None:
        """Show an eval row in the table."""
        self._evaluation = row
        self._draw(self._live.refresh)

    def decision(self, row: Row) -> None:
        """Print a decision above the table."""
        self._above(
            Text(f"at {_integer(row, 'progress/samples')}", style="dim"), Text(decision_text(row), style="cyan")
        )

    def note(self, text: str) -> None:
        """Print a warning or a notice above the table."""
        self._above(Text(printable(text), style="yellow"))

    def close(self) -> None:
        """Draw once more and show the cursor again."""
        self._draw(self._live.stop)

    def _give_up(self) -> None:
        super()._give_up()
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()  # gives sys.stdout back

    def _above(self, *parts: Text) -> None:
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(*parts)
        self._draw(lambda: self._console.print(line))

    def _picture(self) -> Group:
        return Group("", self._progress(), self._figures())

    def _progress(self) -> Table:
        done = _number(self._row, "progress/samples") or 0.0
        line = Table.grid(expand=True, padding=(0, 2, 0, 0))
        line.add_column(no_wrap=True, max_width=_TITLE_WIDTH)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True)
        line.add_row(
            Text(self._title, style="bold", overflow="ellipsis"),
            ProgressBar(total=max(self._max_samples, 1), completed=min(done, self._max_samples)),
            f"{done:,.0f}/{self._max_samples:,} samples",
            Text(f"left {_duration(self._pace.time_left_s(self._max_samples))}", style="bold"),
        )
        return line

    def _figures(self) -> Text:
        row = self._row
        dropped = _number(row, "train/steps_dropped") or 0
        layout = _layout(row, " = {} micro-batch × {} accumulation × {} replicas")
        lines = [
            ("training loss", _figure(self._losses, "train/loss")),
            *_evaluation_figures(self._evaluation),
            ("global batch", f"{_integer(row, 'batch/global')}{layout}"),
            ("noise scale", noise_scale_text(row, level=self._level)),
            ("learning rate", _learning_rate(row)),
            ("speed", f"{self._pace.text} samples/s"),
            ("steps", f"{_integer(row, 'step')}, {dropped:,.0f} dropped"),
        ]
        width = max(len(name) for name, _ in lines) + 2
        styles = {"noise scale": "bold", "steps": "red" if dropped else ""}
        # Not a table: this is drawn often, and a table costs twice the time.
        parts = [((f"{name:<{width}}", "dim"), (f"{value}\n", styles.get(name, ""))) for name, value in lines]
        return Text.assemble(*(part for pair in parts for part in pair), end="")


class _EnduringConsole(Console):
    def on_broken_pipe(self) -> None:
        """Let the error through to `View._draw`: rich would end the process, ours goes on training."""
        raise  # noqa: PLE0704 - rich calls this while it handles the error


class _Pace:
    """How fast samples go by, averaged over the last tenth of the run: evaluations count, single hiccups hardly do."""

    def __init__(self, *, memory_samples: float) -> None:
        self._memory_samples = max(memory_samples, 1.0)
        self._last: tuple[float, float] | None = None
        self._samples = self._training_s = 0.0  # decayed sums, for the speed while training
        self._wall_samples = self._wall_s = 0.0  # the same with all that happens between steps, for the time left

    def add(self, row: Row) -> None:
        done, wall_s = _number(row, "progress/samples") or 0.0, _number(row, "progress/wall_s") or 0.0
        batch, speed = _number(row, "batch/global") or 0.0, _number(row, "throughput/samples_per_sec") or 0.0
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
        return f"{self.samples_per_s:,.0f}" if self.samples_per_s else _NOTHING

    @property
    def samples_per_s(self) -> float:
        return self._samples / self._training_s if self._training_s else 0.0

    def time_left_s(self, max_samples: int) -> float | None:
        pace = self._wall_samples / self._wall_s if self._wall_s else self.samples_per_s
        return max(max_samples - self._last[0], 0.0) / pace if self._last and pace else None


def noise_scale_text(row: Row, *, level: float | None = None) -> str:
    """Say what a train row knows of the noise scale: "1.2k (0.9k–1.6k, 95 %)", "at least 800", or "not resolved yet".

    Args:
        row: a train row; without any noise_scale/ field the answer is "not measured".
        level: shown with the interval where given.
    """
    state = row.get("noise_scale/state")
    value, lower, upper = (_number(row, f"noise_scale/{name}") for name in ("value", "lower", "upper"))
    if state == "resolved" and value is not None and lower is not None:
        highest = "∞" if upper is None else _compact(upper, like=value)
        percent = "" if level is None else f", {100 * level:g} %"
        return f"{_compact(value, like=value)} ({_compact(lower, like=value)}–{highest}{percent})"
    if state == "at least" and lower is not None:
        return f"at least {_compact(lower, like=lower)}"
    return "not measured" if state is None else "not resolved yet"


def decision_text(row: Row) -> str:
    """Say a row of `decisions.jsonl` in a line: the batch and the rate, as far as they move, and the reason."""
    before, after = _number(row, "lr_factor/before"), _number(row, "lr_factor/after")
    changes = [f"learning rate × {after / before:.3g}"] if before and after and before != after else []
    if row.get("batch/before") != row.get("batch/after") or not changes:  # advice that is taken back moves neither
        changes.insert(0, f"batch {_integer(row, 'batch/before')} → {_integer(row, 'batch/after')}")
    return f"{', '.join(changes)}: {printable(str(row.get('reason', '')))}"


def _compact(value: float, *, like: float) -> str:
    """Write a number in the unit of another: 930 beside 1200 is 0.9k; a far smaller one keeps its own unit."""
    size, suffix = next((unit for unit in _UNITS if abs(like) >= unit[0] and abs(value) >= unit[0] / 10), _UNITS[-1])
    decimals = 0 if abs(value) >= _TWO_DIGITS * size else 1
    return f"{value / size:,.{decimals}f}{suffix}"


def _smoothed(row: Row, *, before: Row) -> Row:
    """Average the training loss over some ten rows; one that is not finite shows as it is."""
    loss, average = _number(row, "train/loss"), _number(before, "train/loss")
    if loss is None or average is None:
        return {"train/loss": row.get("train/loss")}
    return {"train/loss": _LOSS_MEMORY * average + (1 - _LOSS_MEMORY) * loss}


def _evaluation_figures(row: Row) -> list[tuple[str, str]]:
    """Name and value of each figure of an eval row, the loss first."""
    names = [name for name in row if name.startswith("eval/")]
    names.sort(key=lambda name: name != "eval/loss")
    return [
        (
            "held-out loss" if name == "eval/loss" else printable(name.removeprefix("eval/").replace("_", " ")),
            _figure(row, name),
        )
        for name in names
    ]


def _layout(row: Row, form: str) -> str:
    """Fill micro-batch, accumulation steps and replicas into `form`; nothing where they do not give the batch."""
    batch, micro, accumulation = (row.get(f"batch/{name}") for name in ("global", "micro", "accumulation"))
    if not (isinstance(batch, int) and isinstance(micro, int) and isinstance(accumulation, int)):
        return ""
    replicas, rest = divmod(batch, max(micro * accumulation, 1))
    return "" if rest else form.format(f"{micro:,}", f"{accumulation:,}", replicas)


def _figure(row: Row, name: str) -> str:
    value = _number(row, name)
    if value is None:
        return "not finite" if name in row else _NOTHING
    return f"{value:.3f}" if value == 0 or _SMALL <= abs(value) < _LARGE else f"{value:.3e}"


def _integer(row: Row, name: str) -> str:
    value = _number(row, name)
    return _NOTHING if value is None else f"{value:,.0f}"


def _learning_rate(row: Row) -> str:
    value = _number(row, "train/lr")
    if value is None:
        return _NOTHING
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return _NOTHING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _is_capable_terminal(stream: TextIO) -> bool:
    try:
        terminal = stream.isatty()
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False
    speaks_utf8 = "utf" in (getattr(stream, "encoding", None) or "").lower()
    return terminal and speaks_utf8 and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
