"""Options as people spell them, brought to one spelling: dashes or underscores in names, 1e5 or 100k for a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dptrain.config.counts import as_count, is_number


def dashed(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with dashes in the names of options; values stay as they are."""
    return [_respelt(argument, "_", "-") for argument in arguments]


_SHORT = {"--from": "--model.weights", "--teacher": "--distillation.teacher"}
"""Names that stand for a setting: `from` is none that Python would take."""


def underscored(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with underscores in the names of options, as settings have them in Python."""
    return [_in_full(_respelt(argument, "-", "_")) for argument in arguments]


def as_option(name: str) -> str:
    """Return how a setting is written on the command line: --run-dir for run_dir."""
    return f"--{name.replace('_', '-')}"


def _respelt(argument: str, before: str, after: str) -> str:
    if not is_option(argument):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace(before, after)}{equals}{value}"


def _in_full(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"{_SHORT.get(name, name)}{equals}{value}"


def is_option(argument: str) -> bool:
    """Whether an argument is the name of an option, perhaps with its value: --name or --name=value."""
    return argument.startswith("--") and argument[2:3].isalpha()


def with_numbers(arguments: Sequence[str], *, types: Mapping[str, Any]) -> list[str]:
    """Return the arguments with 1e5, 100k and 1M as plain numbers, where an option takes a number.

    Args:
        arguments: with underscores in the names.
        types: name of an option → type of its value.
    """
    found: list[str] = []
    for name, argument in _owned(arguments):
        option, equals, value = argument.partition("=") if is_option(argument) else ("", "", argument)
        count = as_count(value) if is_number(types.get(name)) else None
        found.append(argument if count is None else f"{option}{equals}{count}")
    return found


def _owned(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each argument after the name of the option whose value it is or holds."""
    name = ""
    for argument in arguments:
        if is_option(argument):
            name = argument[2:].partition("=")[0]
        yield name, argument
