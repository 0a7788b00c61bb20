"""How an error quotes a value that somebody gave: short, on one line, and never failing for the value's sake."""

from __future__ import annotations

_LONGEST = 80
"""Characters of a value that is quoted; the sentence round it takes a line of its own."""


def shown(value: object) -> str:
    """Return a value as Python writes it, cut where it is long, and its type alone where that takes several lines."""
    try:
        text = repr(value)
    except ValueError:
        return "a number with thousands of digits"  # which Python does not write
    if "\n" in text:
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
