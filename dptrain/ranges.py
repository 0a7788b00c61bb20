"""What values a setting may have beside its type, written on the field that holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_TRACKER_NAMES = {"wandb", "tensorboard", "trackio", "mlflow"}
_LONGEST_PATH, _LONGEST_PART = 4000, 255  # bytes that Linux file systems take


@dataclass(frozen=True, kw_only=True)
class Range:
    """Which values of its type a setting may have.

    Attributes:
        text: completes "it must be …".
        holds: whether a value is one of them; not asked about None.
    """

    text: str
    holds: Callable[[Any], bool]


def setting(default: Any, allowed: Range) -> Any:  # noqa: ANN401 - as dataclasses.field
    """Return a dataclass field with a default and the range that `config.validation.check_ranges` holds it to."""
    return field(default=default, metadata={"range": allowed})


def between(lowest: float, highest: float) -> Range:
    """Return the range from `lowest` to `highest`, both included."""
    return Range(text=f"from {lowest} to {highest}", holds=lambda value: lowest <= value <= highest)


def _is_name(value: str) -> bool:
    return value != "" and value.isprintable()


def _is_path(value: str) -> bool:
    return (
        _is_name(value)
        and len(value.encode()) <= _LONGEST_PATH
        and all(len(part.encode()) <= _LONGEST_PART for part in value.split("/"))
    )


AT_LEAST_0 = Range(text="at least 0", holds=lambda value: value >= 0)
AT_LEAST_1 = Range(text="at least 1", holds=lambda value: value >= 1)
AT_LEAST_2 = Range(text="a factor of at least 2", holds=lambda value: value >= 2)  # noqa: PLR2004 - as it says
PORT = Range(text="a port from 1 to 65535", holds=lambda value: 1 <= value <= 65535)  # noqa: PLR2004 - as it says
AT_LEAST_1_OR_AUTO = Range(text="at least 1, or auto", holds=lambda value: value == "auto" or value >= 1)
POSITIVE = Range(text="positive", holds=lambda value: value > 0)
ABOVE_1 = Range(text="a ratio of batches above 1, such as 1.5", holds=lambda value: value > 1)
DECAY = Range(text="in [0, 1)", holds=lambda value: 0 <= value < 1)
SHARE = Range(text="above 0 and at most 1", holds=lambda value: 0 < value <= 1)
LEVEL = Range(text="between 0 and 1, such as 0.95", holds=lambda value: 0 < value < 1)
NAME = Range(text="a text without control characters", holds=_is_name)
SCHEDULES = ("constant", "cosine", "linear", "wsd")
SCHEDULE = Range(
    text=f"one of {', '.join(SCHEDULES)}, or file.py:function",
    holds=lambda value: value in SCHEDULES or (":" in value and value.isprintable()),
)
PATH = Range(
    text="a path without control characters, of at most 4,000 bytes, each part at most 255",
    holds=_is_path,
)
TRACKERS = Range(
    text="auto, none, or some of wandb, tensorboard, trackio, mlflow joined by +",
    holds=lambda value: (
        value in ("auto", "none")
        or (len(set(value.split("+"))) == len(value.split("+")) and set(value.split("+")) <= _TRACKER_NAMES)
    ),
)
