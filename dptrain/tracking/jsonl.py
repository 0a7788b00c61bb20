"""The JSONL log, which is the truth of a run: how rows are written, read and cut back; who fills them is the trainer.

A log is UTF-8 text with one strict JSON object per line. Values are flat: number, string, boolean or null; a number
that is not finite is written as null. `metrics.jsonl` holds two kinds of row, by `kind`:

kind="train", one per logged optimizer step
    step                        optimizer steps done, this one included; steps that were dropped count
    progress/samples            samples seen, this step included
    progress/tokens             the same in tokens, where the task says how many a sample has
    progress/epoch              the same in passes over the training data
    progress/wall_s             seconds of training, earlier attempts included
    train/loss                  mean loss per sample over the global batch
    train/<part>                the same of each further part that the task's loss returns by name; where there are many
                                with a slash in their names, in some rows only
    train/routed_samples/<group>, train/routed_tokens/<group>
                                share of the samples, and of the tokens, that an expert processed a part of (task gpt)
    train/lr                    learning rate that was applied
    train/grad_norm             norm of the averaged gradient before clipping
    train/steps_dropped         steps skipped so far, on all replicas together, for a gradient that was not finite
    batch/global, batch/micro, batch/accumulation
                                samples per step; samples per forward–backward; micro-batches per replica and step
    batch/lr_factor             factor of its rule on the scheduled learning rate, at this batch and noise scale
    batch/tokens                tokens per step, where the task says how many a sample has
    noise_scale/state                   "resolved", "at least", "not resolved yet" or "inconsistent"
    noise_scale/value                   now (last 1 % of the steps, 20 at least), in samples; null unless resolved
    noise_scale/lower, noise_scale/upper        its interval; upper null = unbounded
    noise_scale/grad_sq, noise_scale/trace      |G|² and tr(Σ) per sample, now; may be negative
    noise_scale/effective_steps         steps of equal weight that |G|² now is worth
    noise_scale/window_mean             the ratio of the running means, half-life 20 % of the run
    noise_scale/<group>/value, noise_scale/<group>/lower, noise_scale/<group>/upper
                                the same of a part of the model, with noise.groups
    throughput/samples_per_sec  samples per second since the last logged step
    throughput/tokens_per_sec   the same in tokens, where the task says how many a sample has
    time/step_s                 seconds of this step; null where something else than training fell into it
    time/world_size             replicas
    ledger/…                    used up to now, earlier attempts included (see ledger.py): flops, device_s (devices ×
                                seconds), mfu, energy_j, cost; null where not known

kind="eval", one per evaluation
    step, progress/samples      as above
    eval/loss                   mean held-out loss per sample
    eval/<metric>               each further figure of the task, such as eval/bits_per_byte

`decisions.jsonl` holds one row per decision on the batch that differs from the one before; where the batch stays, the
rule of the learning rate may move it with the noise scale all the same, and batch/lr_factor tells:
    step, progress/samples      when it was taken
    batch/before, batch/after   global batch in samples
    lr_factor/before, lr_factor/after
                                factor on the scheduled learning rate
    applied                     false where it is advice (control.mode=advise)
    reason                      a sentence
    noise_scale/…                       the measurement that it rests on, as above
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from dptrain.errors import DptrainError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType
    from typing import Self

_BLOCK_BYTES = 1 << 16
Value = int | float | str | bool | None
"""What a field of a row may hold."""


class JsonlLog:
    """An append-only log of flat rows. Each row reaches the operating system before `write` returns.

    A process that is killed loses at most the line being written; `fsync` is not called, so a power cut may cost
    the last seconds. The file is readable by its owner alone.

    Args:
        path: file to create; its folder exists.
        key: the field that orders rows; every row has it, and `resume` cuts by it.
        append: go on in a log that exists, behind its last whole row: what a kill left of a torn one is cut off.
            `resume` cuts it at a step first.

    Attributes:
        steps: of the rows of training steps that `resume` has kept.
        damage: what `resume` found wrong with the log and has left out; empty for nothing.
        last_dropped: the largest step of the rows that `resume` has dropped for lying behind its place; 0 for none.

    Raises:
        DptrainError: where `path` exists already and `append` is false: two runs in one log could not be separated.
    """

    steps: Sequence[int] = ()
    damage: str = ""
    last_dropped: int = 0

    def __init__(self, path: Path | str, *, key: str = "step", append: bool = False) -> None:
        self._path = Path(path)
        self._key = key
        self._pending = b""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if append else os.O_EXCL)
        torn = _unended(self._path) if append else b""
        try:
            self._fd = os.open(self._path, flags, 0o600)
        except FileExistsError:
            raise DptrainError(f"{self._path} exists already: resume that run, or choose another folder") from None
        os.fchmod(self._fd, 0o600)  # the umask may have taken our own rights away, or an older file been open to others
        if _parse(torn) is not None:
            self._pending = b"\n"  # a whole row that lacks its end alone
        elif torn:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - len(torn))

    @classmethod
    def resume(cls, path: Path | str, *, up_to: int, key: str = "step") -> Self:
        """Open the log of an earlier attempt so that it goes on behind `up_to`, without a hole or a double row.

        Every row whose `key` is larger than `up_to` is dropped, and so is a torn last line. What a loss of power or a
        careless edit has left (lines that are no rows, rows that stand twice) is dropped too, and named in `damage`:
        training does not depend on its log. One pass over the lines, none of which is kept in memory. Where all that is
        dropped lies at the end, the file is cut in one call; else a shorter one replaces it by rename. So a kill in
        between leaves the one or the other. No file is an empty log.
        """
        path = Path(path)
        kept = _Kept(key=key, up_to=up_to)
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    kept.take(line)
            if kept.has_holes:
                _rewrite(path, kept.spans)
            else:
                os.truncate(path, kept.end)
        log = cls(path, key=key, append=True)
        log.steps = kept.steps
        log.last_dropped = kept.last_dropped
        log.damage = _damage(kept.garbled, num_doubled=kept.num_doubled)
        return log

    def write(self, row: Mapping[str, Value]) -> None:
        """Append `row` as one line, fields in the order given.

        Raises:
            OSError: where the disk does not take it. The row is kept and goes out, whole and in order, before the
                next one, so a caller may report the error and go on.
        """
        assert self._key in row, f"a row of {self._path.name} needs the field {self._key!r}"
        self._pending += _line(row)
        self._flush()

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        if self._fd >= 0:
            try:
                self._flush()
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _flush(self) -> None:
        # Not a buffered file object: after a full disk that one cannot say which bytes are still to come.
        while self._pending:
            self._pending = self._pending[os.write(self._fd, self._pending) :]


def read_rows(path: Path | str) -> list[dict[str, Value]]:
    """All rows of a log, oldest first. A last line that was torn by a kill is skipped.

    Raises:
        DptrainError: where a line other than the last is not a JSON object.
        OSError: where the file cannot be read.
    """
    lines = Path(path).read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    rows: list[dict[str, Value]] = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise DptrainError(
                f"line {number} of {path} is not a row of a log ({len(lines)} lines in all), "
                "so the file was damaged after it was written: remove that line if the rest is to be used"
            )
    return rows


def rows_from_end(path: Path) -> Iterator[tuple[int, int, dict[str, Value]]]:
    """Yield (first byte, byte behind it, row) from the last row of a log to the first, and read no more than is taken.

    Raises:
        DptrainError: at a line that is not a row; a torn last one is passed over.
    """
    is_last = True
    for start, line in _lines_from_end(path):
        row = _parse(line.removesuffix(b"\n"))
        if row is not None:
            yield start, start + len(line), row
        elif not is_last or line.endswith(b"\n"):
            raise DptrainError(
                f"what stands at byte {start:,} of {path} is not a row of a log, so the file was damaged after it was "
                "written: remove that line if the rest is to be used"
            )
        is_last = False


def _lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their first bytes, the last one first; none where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        end = start = file.seek(0, os.SEEK_END)
        rest = b""
        while start:
            size = min(_BLOCK_BYTES, start)
            start -= size
            file.seek(start)
            # Of the first line in hand the beginning may be missing. Only at \n: a row may hold other line breaks.
            rest, *lines = _split_lines(file.read(size) + rest)
            for line in reversed(lines):
                end -= len(line)
                yield end, line
        if rest:
            yield 0, rest


def _split_lines(text: bytes) -> list[bytes]:
    lines = [line + b"\n" for line in text.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


class _Kept:
    """What `JsonlLog.resume` keeps of a log, fed line by line.

    Attributes:
        steps: of the rows of training steps that are kept.
        garbled: numbers of the lines that are no rows.
        num_doubled: rows that stand twice.
        last_dropped: the largest place of a row that is dropped for lying too far; 0 for none.
        has_holes: whether something that is dropped lies before something that is kept.
        end: byte behind the last line that is kept.
        spans: (first byte, byte behind it) of stretches that are kept.
    """

    def __init__(self, *, key: str, up_to: float) -> None:
        self._key, self._up_to = key, up_to
        self._number = self._offset = 0
        self._seen: set[int] = set()
        self.steps: list[int] = []
        self.garbled: list[int] = []
        self.num_doubled = self.last_dropped = 0
        self.spans: list[list[int]] = []

    @property
    def end(self) -> int:
        return self.spans[-1][1] if self.spans else 0

    @property
    def has_holes(self) -> bool:
        return len(self.spans) > 1 or bool(self.spans and self.spans[0][0])

    def take(self, line: bytes) -> None:
        """Look at the next line, with its end."""
        begin, self._number = self._offset, self._number + 1
        self._offset += len(line)
        row = _parse(line.removesuffix(b"\n"))
        place = None if row is None else row.get(self._key)
        if row is None or type(place) not in (int, float):
            if row is not None or line.endswith(b"\n"):  # else torn by a kill
                self.garbled.append(self._number)
            return
        assert isinstance(place, int | float)
        if place > self._up_to:
            self.last_dropped = max(self.last_dropped, int(place))
            return
        if (seen := hash(line.rstrip(b"\n"))) in self._seen:
            self.num_doubled += 1
            return
        self._seen.add(seen)
        if row.get("kind", "train") == "train":
            self.steps.append(int(place))
        if self.spans and self.spans[-1][1] == begin:
            self.spans[-1][1] = self._offset
        else:
            self.spans.append([begin, self._offset])


def _rewrite(path: Path, spans: Sequence[Sequence[int]]) -> None:
    """Replace a file by the stretches of it that are kept."""
    with (
        path.open("rb") as old,
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as shortened,
    ):
        try:
            for begin, end in spans:
                old.seek(begin)
                shortened.write(old.read(end - begin))
            shortened.flush()
            os.fsync(shortened.fileno())
            Path(shortened.name).replace(path)
        except BaseException:
            Path(shortened.name).unlink(missing_ok=True)
            raise


def read_sound_rows(path: Path, *, key: str = "step") -> tuple[list[dict[str, Value]], list[int]]:
    """Return the rows of a log that are rows, oldest first, and the numbers of the lines that are not.

    A row has a number under `key`. A last line that was torn by a kill is skipped without a word.

    Raises:
        OSError: where the file cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    rows: list[dict[str, Value]] = []
    garbled: list[int] = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None and type(row.get(key)) in (int, float):
            rows.append(row)
        elif row is not None or number < len(lines):
            garbled.append(number)
    return rows, garbled


def _damage(garbled: Sequence[int], *, num_doubled: int) -> str:
    found = []
    if garbled:
        numbers = ", ".join(map(str, garbled[:_MAX_NAMED]))
        more = f" and {len(garbled) - _MAX_NAMED} more" if len(garbled) > _MAX_NAMED else ""
        found.append(
            f"line{'s' if len(garbled) > 1 else ''} {numbers}{more} {'are' if len(garbled) > 1 else 'is'} no row"
        )
    if num_doubled:
        found.append(f"{num_doubled} row{'s stand' if num_doubled > 1 else ' stands'} twice")
    return "; ".join(found)


_MAX_NAMED = 5


def _unended(path: Path) -> bytes:
    """What stands behind the last line break."""
    start_and_line = next(iter(_lines_from_end(path)), (0, b""))
    return b"" if start_and_line[1].endswith(b"\n") else start_and_line[1]


def _parse(line: bytes) -> dict[str, Value] | None:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError:  # JSON and UTF-8 errors alike
        return None
    return row if isinstance(row, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _line(row: Mapping[str, Value]) -> bytes:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    # A lone surrogate (an undecodable file name in a reason) has no UTF-8; its escape is valid JSON.
    return text.encode("utf-8", "backslashreplace") + b"\n"
