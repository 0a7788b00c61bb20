"""Rows of the log as text for people: figures, durations, the noise scale with its interval, one line per decision."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dptrain.tracking.redact import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dptrain.tracking.jsonl import Value

    Row = Mapping[str, Value]

UNKNOWN = "–"
_SMALL, _LARGE = 1e-2, 1e5  # numbers between them read well without an exponent
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_TWO_DIGITS = 9.95  # rounds to 10
_ASCII = str.maketrans(
    {"→": "->", "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "∞": "inf", "±": "+-", "µ": "u", "·": "."}
    | {"²": "^2", "³": "^3", "Σ": "Sigma", "β": "beta", "κ": "kappa", "√": "sqrt", "≤": "<=", "≥": ">=", "½": "1/2"}
)


def spelled(text: str, encoding: str) -> str:
    """Return the text as a stream of this encoding can show it: -> for an arrow; a question mark as the last resort."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    except LookupError:  # no encoding of that name
        return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")
    return text


def noise_scale_text(row: Row) -> str:
    """Return what a train row knows of the noise scale: "1.2k [0.9k, 1.6k]", "at least 800", or "not resolved yet".

    A row without any noise_scale/ field gives "not measured".
    """
    state = row.get("noise_scale/state")
    value, lower, upper = (number(row, f"noise_scale/{name}") for name in ("value", "lower", "upper"))
    if state == "resolved" and value is not None and lower is not None:
        highest = "∞" if upper is None else compact(upper, like=value)
        return f"{compact(value, like=value)} [{compact(lower, like=value)}, {highest}]"
    if state == "at least" and lower is not None:
        return f"at least {compact(lower, like=lower)}"
    return "not measured" if state is None else "not resolved yet"


def decision_text(row: Row) -> str:
    """Return a row of `decisions.jsonl` in a line: batch and learning rate, old → new, and the reason."""
    before, after = number(row, "lr_factor/before"), number(row, "lr_factor/after")
    changes = [f"lr ×{after / before:.3g}"] if before and after and before != after else []
    if moves_batch(row) or not changes:  # advice that is taken back moves neither
        changes.insert(0, f"batch {integer(row, 'batch/before')} → {integer(row, 'batch/after')}")
    advice = "advice, not applied: " if row.get("applied") is False else ""
    return f"{advice}{', '.join(changes)}: {printable(str(row.get('reason', '')))}"


def moves_batch(row: Row) -> bool:
    """Whether a decision changes the batch."""
    return row.get("batch/before") != row.get("batch/after")


def is_rate_alone(row: Row) -> bool:
    """Whether a decision changes the learning rate and nothing else."""
    return not moves_batch(row) and row.get("lr_factor/before") != row.get("lr_factor/after")


def compact(value: float, *, like: float) -> str:
    """Return a number in the unit of another: 930 beside 1200 is 0.9k; a far smaller one keeps its own unit."""
    size, suffix = next((unit for unit in _UNITS if abs(like) >= unit[0] and abs(value) >= unit[0] / 10), _UNITS[-1])
    decimals = 0 if abs(value) >= _TWO_DIGITS * size else 1
    return f"{value / size:,.{decimals}f}{suffix}"


def evaluation_figures(row: Row) -> list[tuple[str, str]]:
    """Return name and value of each figure of an eval row, the loss first."""
    names = [name for name in row if name.startswith("eval/")]
    names.sort(key=lambda name: name != "eval/loss")
    return [
        (
            "held-out loss" if name == "eval/loss" else printable(name.removeprefix("eval/").replace("_", " ")),
            figure(row, name),
        )
        for name in names
    ]


def tokens_text(row: Row, name: str, unit: str, before: str = "") -> str:
    """Return a count of tokens such as 1.3M tokens; empty where samples are not made of tokens."""
    value = number(row, name)
    return "" if value is None else f"{before}{compact(value, like=value)} {unit}"


def layout(row: Row, form: str) -> str:
    """Fill micro-batch, accumulation steps and replicas into `form`; empty where they do not give the batch."""
    batch, micro, accumulation = (row.get(f"batch/{name}") for name in ("global", "micro", "accumulation"))
    if not (isinstance(batch, int) and isinstance(micro, int) and isinstance(accumulation, int)):
        return ""
    replicas, rest = divmod(batch, max(micro * accumulation, 1))
    return "" if rest else form.format(f"{micro:,}", f"{accumulation:,}", replicas)


def figure(row: Row, name: str) -> str:
    """Return a number of a row with four significant digits or so."""
    value = number(row, name)
    if value is None:
        return "not finite" if name in row else UNKNOWN
    return f"{value:.3f}" if value == 0 or _SMALL <= abs(value) < _LARGE else f"{value:.3e}"


def integer(row: Row, name: str) -> str:
    """Return a whole number of a row with commas."""
    value = number(row, name)
    return UNKNOWN if value is None else f"{value:,.0f}"


def learning_rate(row: Row) -> str:
    """Return the learning rate of a train row, such as 3.0e-4."""
    value = number(row, "train/lr")
    if value is None:
        return UNKNOWN
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def step_time(row: Row) -> str:
    """Return the time of a step with its unit, such as 26 ms; empty where it is not known."""
    value = number(row, "time/step_s")
    if not value or value < 0:
        return ""
    size, unit = next((unit for unit in _TIMES if value >= unit[0]), _TIMES[-1])
    return f"{value / size:.{0 if value / size >= _TWO_DIGITS else 1}f} {unit}"


def duration(seconds: float | None) -> str:
    """Return a time as 0:38 or 1:02:03."""
    if seconds is None:
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(row: Row, name: str) -> float | None:
    """Return a finite number of a row; None for anything else."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
