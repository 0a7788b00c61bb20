"""Numbers as people write them (`1e5`, `100k`, `1.5M`), read where a setting is a number; no setting is named here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dptrain.config.validation import choices_of, hints_of, is_group

_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
# No lower-case m: it would be a thousandth to one reader and a million to another.
# No leading zero: 010 is ten to one reader and eight to another.
_COUNT = re.compile(r"(0|[1-9][0-9_]*)(?:\.([0-9]+))?(?:[eE]\+?([0-9]{1,2}))?([kKMGBT]?)", re.ASCII)


def as_count(text: str) -> int | None:
    """Return the whole number that `text` stands for, such as 100000 for "100k" or "1e5"; None where it is none.

    Exact: the digits are shifted, so no float is involved.
    """
    match = _COUNT.fullmatch(text)
    if match is None:
        return None
    whole, fraction, exponent, suffix = match[1], match[2] or "", int(match[3] or 0), match[4]
    digits = int(whole + fraction) * _FACTORS[suffix] * 10**exponent
    number, rest = divmod(digits, 10 ** len(fraction))
    return None if rest else number


def with_counts(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree of settings in which numbers written as text are numbers, where a number is wanted.

    Args:
        kind: the dataclass of settings that the tree belongs to.
        settings: name → value, as YAML gives it; anything that is no such number stays as it is.
    """
    hints = hints_of(kind)
    return {name: _converted(hints.get(name), value) for name, value in settings.items()}


def _converted(hint: Any, value: Any) -> Any:  # noqa: ANN401 - any type, any plain data
    if is_group(hint) and isinstance(value, Mapping):
        return with_counts(hint, value)
    if is_number(hint) and isinstance(value, str):
        count = as_count(value)
        return value if count is None else count
    if takes_count(hint) and isinstance(value, float) and value.is_integer():  # YAML reads 1e5 as a float
        return int(value)
    return value


def takes_count(hint: Any) -> bool:  # noqa: ANN401 - a type hint has no type of its own
    """Whether the values of a field are whole numbers."""
    return int in choices_of(hint) and float not in choices_of(hint)


def is_number(hint: Any) -> bool:  # noqa: ANN401 - a type hint has no type of its own
    """Whether a field takes numbers."""
    return bool({int, float} & set(choices_of(hint)))
