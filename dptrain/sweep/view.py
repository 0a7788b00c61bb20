"""What a person sees of a sweep: a live table on a terminal, one line per event elsewhere; nothing is decided here."""

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
from dptrain.sweep import Arm, CourseOf, Search, SweepSpec, samples_left

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
    running: Collection[Arm]
    samples_per_s: float


class SweepView:
    """Shows a sweep on stderr.

    It draws when it is told to, and not from a thread: runs are copies of this process, and a copy of a process that
    has threads may wait for a lock for ever.

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
        """Tell a sentence."""
        self._console.print(text, markup=False)

    def ended(self, arm: Arm, standing: Standing) -> None:
        """Tell that a run ended, where there is no table that shows it."""
        if self._live is None:
            self.note(f"{self._result(arm)}; {self._summary(standing)}")

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

    def _result(self, arm: Arm) -> str:
        course = self._course_of(arm)
        reached = [
            f"{target:g} after {shown(samples)} samples ({shown(samples / arm.global_batch_size)} steps)"
            for target in self._spec.targets
            if (samples := course.reached(target)) is not None
        ]
        what = ", ".join(reached) or f"no target, lowest held-out loss {course.lowest():.4g}"
        return f"{arm.name}: {'diverged; ' if course.has_diverged else ''}{what}"

    def _summary(self, standing: Standing) -> str:
        arms = [arm for found in standing.searches for arm in found.arms]
        settled = len(arms) - sum(len(found.unsettled) for found in standing.searches)
        left = samples_left(self._spec, standing.searches, self._course_of)
        time_left = (
            f", left about {_duration(left / standing.samples_per_s)}" if standing.samples_per_s and left else ""
        )
        done = sum(not found.unsettled for found in standing.searches)
        return (
            f"{settled} of {len(arms)} runs so far, {len(standing.running)} under way, "
            f"{done} of {len(standing.searches)} batches done{time_left}"
        )

    def _table(self, standing: Standing) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        hardest = self._spec.targets[-1]
        for head in ("batch", "runs", "learning rates", f"best steps to {hardest:g}", "under way"):
            table.add_column(head)
        for found in standing.searches:
            batch = found.arms[0].global_batch_size
            rates = sorted({arm.learning_rate for arm in found.arms})
            running = [arm for arm in standing.running if arm.global_batch_size == batch]
            table.add_row(
                f"{batch:,}",
                f"{len(found.arms) - len(found.unsettled)} of {len(found.arms)}",
                f"{rates[0]:g}–{rates[-1]:g}" if len(rates) > 1 else f"{rates[0]:g}",
                self._best(found.arms, hardest),
                ", ".join(map(self._under_way, sorted(running))),
            )
        return table

    def _best(self, arms: Iterable[Arm], target: float) -> str:
        needed = [(self._course_of(arm).reached(target), arm) for arm in arms]
        best = min(((samples, arm) for samples, arm in needed if samples is not None), default=None)
        return "" if best is None else f"{shown(best[0] / best[1].global_batch_size)} (lr {best[1].learning_rate:g})"

    def _under_way(self, arm: Arm) -> str:
        course = self._course_of(arm)
        share = max(course.positions, default=0.0) / self._spec.max_samples(arm.global_batch_size)
        loss = f" loss {course.losses[-1]:.3g}" if course.losses else ""
        return f"lr {arm.learning_rate:g} seed {arm.seed}{loss} {share:.0%}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
