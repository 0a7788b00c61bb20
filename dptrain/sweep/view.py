"""What a sweep shows on the console: a live table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from dptrain.explain.model.frontier import shown
from dptrain.sweep import CourseOf, Search, SweepRun, SweepSpec, samples_left

_LINE_EVERY_S = 60.0
_SHOWN_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a sweep is.

    Attributes:
        searches: of its batches.
        running: runs under way.
        samples_per_s: of all of them together, since the sweep was started; 0 before the first is known.
    """

    searches: Sequence[Search]
    running: Collection[SweepRun]
    samples_per_s: float


class SweepView:
    """Shows a sweep on stderr.

    It draws inside the calls, not from a thread: runs are forked from this process, and a fork of a process with
    threads may wait for a lock forever.

    Args:
        spec: of the sweep.
        course_of: how far each run came.
        console: default: stderr.
    """

    def __init__(self, spec: SweepSpec, *, course_of: CourseOf, console: Console | None = None) -> None:
        self._spec = spec
        self._course_of = course_of
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._closing = ExitStack()
        self._live: Live | None = None
        self._shown_s = -math.inf
        if self._console.is_terminal:
            live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live = self._closing.enter_context(live)

    def close(self) -> None:
        """Give the terminal back."""
        self._closing.close()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    def ended(self, run: SweepRun, standing: Standing) -> None:
        """Print that a run ended, where no table shows it."""
        if self._live is None:
            self.note(f"{self._result(run)}; {self._summary(standing)}")

    def update(self, standing: Standing) -> None:
        """Show how far the sweep is, now and then."""
        every_s = _LINE_EVERY_S if self._live is None else _SHOWN_EVERY_S
        if time.monotonic() - self._shown_s < every_s:
            return
        if self._live is not None:
            self._live.update(Group(self._table(standing), self._summary(standing)), refresh=True)
        elif math.isfinite(self._shown_s):
            self.note(self._summary(standing))
        self._shown_s = time.monotonic()

    def _result(self, run: SweepRun) -> str:
        course = self._course_of(run)
        reached = [
            f"{target:g} after {shown(samples)} samples ({shown(samples / run.global_batch_size)} steps)"
            for target in self._spec.targets
            if (samples := course.reached(target)) is not None
        ]
        what = ", ".join(reached) or f"no target, lowest held-out loss {course.lowest():.4g}"
        return f"{run.name}: {'diverged; ' if course.has_diverged else ''}{what}"

    def _summary(self, standing: Standing) -> str:
        runs = [run for found in standing.searches for run in found.runs]
        settled = len(runs) - sum(len(found.unsettled) for found in standing.searches)
        left = samples_left(self._spec, standing.searches, self._course_of)
        time_left = (
            f", left about {_duration(left / standing.samples_per_s)}" if standing.samples_per_s and left else ""
        )
        done = sum(not found.unsettled for found in standing.searches)
        return (
            f"{settled} of {len(runs)} runs so far, {len(standing.running)} under way, "
            f"{done} of {len(standing.searches)} batches done{time_left}"
        )

    def _table(self, standing: Standing) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        hardest = self._spec.targets[-1]
        for head in ("batch", "runs", "learning rates", f"best steps to {hardest:g}", "under way"):
            table.add_column(head)
        for found in standing.searches:
            batch = found.runs[0].global_batch_size
            rates = sorted({run.learning_rate for run in found.runs})
            running = [run for run in standing.running if run.global_batch_size == batch]
            table.add_row(
                f"{batch:,}",
                f"{len(found.runs) - len(found.unsettled)} of {len(found.runs)}",
                f"{rates[0]:g}–{rates[-1]:g}" if len(rates) > 1 else f"{rates[0]:g}",
                self._best(found.runs, hardest),
                ", ".join(map(self._under_way, sorted(running))),
            )
        return table

    def _best(self, runs: Iterable[SweepRun], target: float) -> str:
        needed = [(self._course_of(run).reached(target), run) for run in runs]
        best = min(((samples, run) for samples, run in needed if samples is not None), default=None)
        return "" if best is None else f"{shown(best[0] / best[1].global_batch_size)} (lr {best[1].learning_rate:g})"

    def _under_way(self, run: SweepRun) -> str:
        course = self._course_of(run)
        share = max(course.positions, default=0.0) / self._spec.max_samples(run.global_batch_size)
        loss = f" loss {course.losses[-1]:.3g}" if course.losses else ""
        return f"lr {run.learning_rate:g} seed {run.seed}{loss} {share:.0%}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
