"""How far one run of a sweep came: its evaluations, and when they crossed a target; no other run is known here."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dptrain.errors import ConfigError
from dptrain.explain.record import SAMPLES, column, read_jsonl

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dptrain.explain.record import Row

_EVAL = b'"kind": "eval"'


@dataclass(frozen=True, kw_only=True)
class Course:
    """The held-out loss of a run, evaluation by evaluation.

    Attributes:
        positions: samples seen at each evaluation, ascending.
        losses: held-out loss of each; infinite where it was no number.
        is_over: whether the run came to its end by itself: its length, or a divergence.
        has_diverged: whether that end was a divergence.
    """

    positions: Sequence[float] = ()
    losses: Sequence[float] = ()
    is_over: bool = False
    has_diverged: bool = False

    @cached_property
    def _smoothed(self) -> Sequence[float]:
        """Median of each loss and its two neighbours; of the first, the larger of the first two.

        A falling loss is left as it is, so that nothing is late for it; a single lucky dip is taken out. The last loss
        has no neighbour after it yet, and does not count.
        """
        losses = self.losses
        if len(losses) < 2:  # noqa: PLR2004 - none has its neighbours
            return ()
        return [max(losses[:2]), *(sorted(losses[at - 1 : at + 2])[1] for at in range(1, len(losses) - 1))]

    def reached(self, target: float, *, up_to: float = math.inf) -> float | None:
        """Return after how many samples the smoothed loss first was at the target; None where it was not.

        Between two evaluations the logarithm of the loss is taken to fall linearly with the samples (the loss itself,
        where one of the two is not positive). Where the first evaluation is there already, its position is returned.

        Args:
            target: held-out loss.
            up_to: samples after which nothing counts, the evaluation that makes sure among it.
        """
        smoothed = self._smoothed
        for at, loss in enumerate(smoothed):
            if self.positions[at + 1] > up_to:
                return None
            if loss <= target:
                return float(self.positions[at]) if at == 0 else self._between(at, target)
        return None

    def _between(self, at: int, target: float) -> float:
        before, after = self._smoothed[at - 1 : at + 1]
        begin, end = self.positions[at - 1 : at + 1]
        if not math.isfinite(before):
            return float(end)
        if min(before, after, target) > 0:
            before, after, target = math.log(before), math.log(after), math.log(target)
        return begin + (end - begin) * (before - target) / (before - after)

    def is_early(self, target: float) -> bool:
        """Whether the target was reached before the loss was looked at for the first time."""
        return bool(self._smoothed) and self._smoothed[0] <= target

    def lowest(self, *, up_to: float = math.inf) -> float:
        """Return the lowest smoothed loss, infinite before there is any."""
        known = zip(self._smoothed, self.positions[1:], strict=False)
        return min((loss for loss, sure in known if sure <= up_to), default=math.inf)

    def is_beyond(self, samples: float) -> bool:
        """Whether all that happened up to `samples` is known."""
        return bool(self.positions) and self.positions[-1] > samples


class CourseLog:
    """The log of a run as it grows: each reading takes in what was written since the one before.

    Args:
        run_dir: folder of the run, which need not be there yet.
        max_skipped_steps: skipped steps in a row after which the run ends as diverged.
    """

    def __init__(self, run_dir: Path, *, max_skipped_steps: int) -> None:
        self._run_dir = run_dir
        self._max_skipped_steps = max_skipped_steps
        self._forget()

    def _forget(self) -> None:
        self._file_number: int | None = None
        self._num_bytes, self._last_line = 0, b""
        self._evals: list[Row] = []
        self._steps: deque[bytes] = deque(maxlen=self._max_skipped_steps)

    def read(self) -> Course:
        """Return how far the run came.

        Raises:
            ConfigError: where its log is damaged.
        """
        path = self._run_dir / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                self._take_in(file)
        except FileNotFoundError:
            self._forget()
        diverged = self._has_diverged()
        return Course(
            positions=[row[SAMPLES] for row in self._evals],
            losses=[math.inf if row["eval/loss"] is None else row["eval/loss"] for row in self._evals],
            is_over=diverged or (self._run_dir / "summary.json").is_file(),
            has_diverged=diverged,
        )

    def _take_in(self, file: BinaryIO) -> None:
        number = os.fstat(file.fileno()).st_ino
        file.seek(self._num_bytes - len(self._last_line))
        if number != self._file_number or file.read(len(self._last_line)) != self._last_line:
            # Another attempt has truncated the log and writes its steps again; by now it may be longer than before.
            self._forget()
            self._file_number = number
            file.seek(0)
        whole = file.read().rpartition(b"\n")[0]
        for line in whole.split(b"\n") if whole else []:
            if _EVAL in line:  # training rows are a hundred times as many, and are not wanted
                self._evals.append(_row(line, file=file.name))
            else:
                self._steps.append(line)
        if whole:
            self._num_bytes += len(whole) + 1
            self._last_line = whole.rpartition(b"\n")[2] + b"\n"

    def _has_diverged(self) -> bool:
        """Whether the last steps, as many as end a run, were all skipped; where the log leaves steps out: unknown."""
        if len(self._steps) < self._max_skipped_steps:
            return False
        rows = [_row(line, file=self._run_dir) for line in self._steps]
        return all(row.get("train/loss") is None for row in rows) and (
            rows[-1]["step"] - rows[0]["step"] == self._max_skipped_steps - 1
        )


def _row(line: bytes, *, file: object) -> Row:
    try:
        row: Row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}): remove the folder of that run to train it again") from error
    return row


def read_course(run_dir: Path, *, max_skipped_steps: int) -> Course:
    """Read how far a run came, be it at its end, under way, or not begun; see `CourseLog`."""
    return CourseLog(run_dir, max_skipped_steps=max_skipped_steps).read()


def read_clock(run_dir: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Read how many samples a run had seen after how many seconds, each of shape (logged steps,)."""
    rows = [row for row in read_jsonl(run_dir / "metrics.jsonl") if row.get("kind") == "train"]
    return column(rows, SAMPLES), column(rows, "progress/wall_s")
