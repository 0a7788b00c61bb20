"""What a replica that fails leaves for its launcher, and which of several failures is the cause of the others."""

from __future__ import annotations

import json
import os
import re
import signal
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dptrain.errors import AbortedError, DptrainError
from dptrain.runtime.signals import EXIT_HUNG, EXIT_RESUMABLE
from dptrain.tracking.redact import printable

_EXIT_OTHER = 70


@dataclass(frozen=True, kw_only=True)
class FailureReport:
    """Why a replica ended, as it reported itself.

    Attributes:
        sentence: one line.
        trace: the traceback, where nobody foresaw the error; else empty.
        is_consequence: whether it ended because another one had.
        place: the step that it was raised in, such as "in step 12"; empty outside of steps.
    """

    sentence: str
    trace: str
    is_consequence: bool
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a replica ended.

    Attributes:
        rank: which.
        code: its exit code, or minus the number of the signal that killed it.
        report: what it left; None where it left nothing.
        outcome: what its trainer reported, 0 for a run that is done or 75 for one that stopped and can be resumed; None
            where it reported nothing. An exit code alone says nothing: a `sys.exit()` in a data set ends with 0, too.
    """

    rank: int
    code: int
    report: FailureReport | None = None
    outcome: int | None = None

    @property
    def is_wanted(self) -> bool:
        """Whether it did what it was started for, or what it was asked for."""
        return self.outcome is not None

    @property
    def is_consequence(self) -> bool:
        """Whether the cause is to be looked for in another replica."""
        return self.report is not None and self.report.is_consequence

    @property
    def blames_a_hang(self) -> bool:
        """Whether the other replica did not answer, so that no report of it will come."""
        return self.report is not None and re.search("timed? ?out", self.report.sentence, re.IGNORECASE) is not None


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why an attempt ended as it did.

    Attributes:
        code: exit code of the attempt.
        sentence: one line; empty where all is as it should be.
        trace: a traceback to be shown before it, or empty.
        place: the step that it was raised in, or empty.
    """

    code: int
    sentence: str = ""
    trace: str = ""
    place: str = ""

    def failure(self, *, step: int) -> str:
        """Return exception and step, for the policy to compare attempts by; empty where no exception was unforeseen.

        Args:
            step: of the newest checkpoint: outside of steps, such as in an evaluation, it says how far the run was.
        """
        place = self.place or f"after the checkpoint of step {step}"
        return f"{self.sentence.partition(' failed with ')[2]} {place}" if self.trace else ""


def write_failure(error: Exception, *, environment: Mapping[str, str] = os.environ) -> bool:
    """Leave an error for the launcher, which reports the root cause once.

    Returns:
        Whether there is a launcher that will read it; if not, the caller reports the error.
    """
    if "DPTRAIN_STORE" not in environment:
        return False
    foreseen = isinstance(error, DptrainError)
    text = printable(_brief(error))
    report = FailureReport(
        sentence=text if foreseen else f"{type(error).__name__}: {text}".removesuffix(": "),
        trace="" if foreseen else _tellable_trace(error),
        is_consequence=isinstance(error, AbortedError),
        place=next((note.partition(", samples ")[0] for note in _notes(error) if note.startswith("in step ")), ""),
    )
    path = _path(Path(environment["DPTRAIN_STORE"]).parent, rank=int(environment["RANK"]))
    try:
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(asdict(report)), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return False
    return True


def _notes(error: Exception) -> list[str]:
    return list(getattr(error, "__notes__", []))


def write_outcome(code: int, *, environment: Mapping[str, str] = os.environ) -> None:
    """Tell the launcher, if there is one that listens, what the trainer came to.

    Args:
        code: 0 where the run is done, 75 where it stopped on request and can be resumed.
        environment: the launcher's.
    """
    if "DPTRAIN_STORE" in environment:
        path = _outcome_path(Path(environment["DPTRAIN_STORE"]).parent, rank=int(environment["RANK"]))
        temporary = path.with_suffix(".new")
        temporary.write_text(str(code), encoding="ascii")
        temporary.replace(path)


def read_outcome(folder: Path, *, rank: int) -> int | None:
    """Return what a replica's trainer has reported in the folder of its attempt, or None."""
    try:
        return int(_outcome_path(folder, rank=rank).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None


def _brief(error: Exception) -> str:
    """Return what an error says, in a line; of a traceback inside it, as a worker's has one, the end."""
    lines = str(error).splitlines()
    return " ".join(
        " ".join(line.split())
        for line in lines
        if line and not line.startswith((" ", "Traceback (", "Original Traceback"))
    )


def _tellable_trace(error: Exception) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "".join(f"{printable(line)}\n" for line in lines)


def read_failures(folder: Path, *, rank: int) -> FailureReport | None:
    """Return what a replica left in the folder of its attempt, or None."""
    try:
        return FailureReport(**json.loads(_path(folder, rank=rank).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def root_cause(endings: Sequence[Ending], *, killed: Collection[int] = (), asked_to_stop: bool = False) -> Cause:
    """Find the one ending that explains the others.

    Args:
        endings: of all replicas, in the order in which they ended.
        killed: ranks that the launcher itself has killed; what they came to explains nothing.
        asked_to_stop: whether the launcher was.
    """
    outcomes = {ending.outcome for ending in endings}
    if len(outcomes) == 1 and (outcome := endings[0].outcome) is not None:
        return Cause(code=outcome, sentence=_afterwards(endings, outcome=outcome))
    failed = [ending for ending in endings if not ending.is_wanted and ending.rank not in killed]
    if own := [ending for ending in failed if not ending.is_consequence]:
        # Several may have found the same; the first of them in rank speaks.
        speaker = min((e for e in own if e.report == own[0].report and e.code == own[0].code), key=lambda e: e.rank)
        return _cause(speaker, num_replicas=len(endings))
    if killed:
        hung = "could not stop in time" if asked_to_stop else "did not answer any more"
        return Cause(code=EXIT_HUNG, sentence=f"{_names(killed, len(endings))} {hung}, and had to be killed")
    if early := [ending for ending in endings if ending.is_wanted]:
        who = _name(early[0].rank, len(endings))
        return Cause(code=_EXIT_OTHER, sentence=f"{who} ended with exit code {early[0].code} before the others")
    return _cause(failed[0], num_replicas=len(endings))


def _cause(ending: Ending, *, num_replicas: int) -> Cause:
    who = _name(ending.rank, num_replicas)
    if ending.code in (0, EXIT_RESUMABLE) and ending.report is None:
        return Cause(
            code=_EXIT_OTHER,
            sentence=f"{who} ended with exit code {ending.code} before its trainer had reported an end: does the task, "
            "or a library that it uses, end the process?",
        )
    code = ending.code if ending.code > 0 else 128 - ending.code
    if ending.report is None:
        return Cause(code=code, sentence=f"{who} {_describe(ending.code)}")
    if ending.report.trace:
        return Cause(
            code=code,
            sentence=f"{who} failed with {ending.report.sentence}",
            trace=ending.report.trace,
            place=ending.report.place,
        )
    return Cause(code=code, sentence=ending.report.sentence if ending.rank == 0 else f"{who}: {ending.report.sentence}")


def _afterwards(endings: Sequence[Ending], *, outcome: int) -> str:
    """Say what went wrong once all trainers had reported their end; that end is what counts. Empty for nothing."""
    odd = [ending for ending in endings if ending.code not in (0, outcome)]
    if not odd:
        return ""
    report = odd[0].report
    what = f"failed with {report.sentence}" if report is not None else _describe(odd[0].code)
    end = "done" if outcome == 0 else "stopped and can be resumed"
    return f"warning: {_name(odd[0].rank, len(endings))} {what} afterwards; the run is {end}"


def _describe(code: int) -> str:
    if code < 0:
        return f"was killed by {_signal_name(-code)}"
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return f"was ended by {_signal_name(code - 128)} before it had saved"
    if code == EXIT_HUNG:
        return "was asked to stop and could not"
    return f"ended with exit code {code} and left no reason"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"


def _names(ranks: Collection[int], num_replicas: int) -> str:
    if len(ranks) == 1:
        return _name(next(iter(ranks)), num_replicas)
    return f"replicas {', '.join(map(str, sorted(ranks)))} of {num_replicas}"


def _name(rank: int, num_replicas: int) -> str:
    return f"replica {rank} of {num_replicas}"


def _outcome_path(folder: Path, *, rank: int) -> Path:
    return folder / f"outcome-{rank}"


def _path(folder: Path, *, rank: int) -> Path:
    return folder / f"replica-{rank}.json"
