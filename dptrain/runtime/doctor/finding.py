"""One result of an examination: what was checked, whether it is well, and what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """Training works, slower or at a risk."""
    FAILURE = "failure"
    """Training would not start, or would be wrong."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name, such as "run folder".
        status: how it ended.
        text: what was found, in one sentence.
        remedy: what to do; needed unless the status is OK.
        figures: numbers behind the text, by name with their unit.
    """

    check: str
    status: Status = Status.OK
    text: str
    remedy: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.remedy or self.status is Status.OK, f"{self.check}: a problem needs its remedy"

    def as_record(self) -> dict[str, Any]:
        """Return the finding as JSON has it."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Self:
        """Return the finding that `as_record` was taken from."""
        return cls(**{**record, "status": Status(record["status"])})


def ranks_text(ranks: Iterable[int]) -> str:
    """Return ranks as a person writes them: `rank 3`, `ranks 0–3, 6`."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)
    return f"rank {text}" if len(ordered) == 1 else f"ranks {text}"
