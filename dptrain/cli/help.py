"""`dptrain train --help`: the common settings on one screen, the others by group."""

from __future__ import annotations

import sys
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

from dptrain.cli.spelling import as_option
from dptrain.config.settings_file import nearest, setting_types
from dptrain.config.validation import choices_of
from dptrain.errors import ConfigError

_COMMON = (
    "task",
    "run_dir",
    "max_samples",
    "global_batch_size",
    "micro_batch_size",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "precision",
    "control.mode",
    "log.tracker",
)
_GROUPS: Mapping[str, str] = {
    "run": "seed, length in steps, device, precision, branching, data loading",
    "model": "weights to start from (--from), head, frozen parts, adapters, rates by layer",
    "distillation": "a teacher (--teacher), its temperature and its weight in the loss",
    "sparsity": "weights kept at zero, by a mask that stays or that moves while training",
    "execution": "compilation, wrapping, tf32, activation checkpointing",
    "exchange": "what replicas send one another, fully or seldom",
    "optimizer": "name, learning-rate schedule and rule, betas, clipping",
    "early_stopping": "when a run ends before its length",
    "control": "law and bounds of the batch size",
    "noise": "how the noise scale is measured",
    "checkpoint": "how often state is saved, how many are kept",
    "log": "rows, evaluations, console, tracker, price",
}
_WIDTH, _COLUMN = 110, 30
_KINDS: Mapping[object, str] = {int: "N", float: "X", str: "TEXT", bool: "{true,false}", dict: "YAML"}
_PLACES: Mapping[str, str] = {"run_dir": "DIR", "task": "NAME", "branch_from": "DIR", "config": "FILE"}

_HEAD = """\
usage: dptrain train [--task NAME] [SETTINGS] [--replicas N] [--resume]

Train a task on all replicas, measure the gradient noise scale, and adapt the batch to it.
Settings come from the --config files in their order, then from the command line; the later one wins.
"""
_FOOT = "Numbers may be written 1e5, 100k or 1M; names with dashes or underscores. `dptrain tasks` lists the tasks."


def show_help(arguments: Sequence[str], parser: ArgumentParser) -> None:
    """Print the help that is asked for, if any, and end.

    Args:
        arguments: of the command.
        parser: knows every setting with its text.

    Raises:
        ConfigError: for a group that does not exist.
        SystemExit: after the help was printed.
    """
    for at, argument in enumerate(arguments):
        if argument in ("-h", "--help") or argument.startswith("--help="):
            follows = [text for text in arguments[at + 1 : at + 2] if not text.startswith("-")]
            group = argument.partition("=")[2] or next(iter(follows), "")
            sys.stdout.write("\n".join(_help(group, parser)) + "\n")
            raise SystemExit(0)


def _help(group: str, parser: ArgumentParser) -> Iterator[str]:
    # The parser gets a hidden action of its library's when it parses.
    all_actions = parser._actions  # noqa: SLF001 - argparse has no other way
    actions = {action.dest: action for action in all_actions if action.help != SUPPRESS}
    names = list(setting_types())
    if not group:
        yield from _overview(actions, names)
    elif group == "all":
        for one in _GROUPS:
            yield from _group(one, actions, names)
    elif group in _GROUPS:
        yield from _group(group, actions, names)
    else:
        raise ConfigError(f"--help={group}: there is no such group{nearest(group, [*_GROUPS, 'all'])}; {_listed()}")


def _listed() -> str:
    return f"groups are {', '.join(_GROUPS)} and all"


def _overview(actions: Mapping[str, Action], names: Sequence[str]) -> Iterator[str]:
    yield _HEAD
    yield "common settings:"
    for name in _COMMON:
        yield _row(_usage(name), _summary(actions[name]))
    yield "\nthis call only:"
    settings = {name.partition(".")[0] for name in names}
    for name in (name for name in actions if name.partition(".")[0] not in settings):
        yield _row(_usage(name, actions[name]), _text(actions[name]))
    yield "\nall settings, by group:"
    for group, text in _GROUPS.items():
        yield _row(f"--help={group}", text)
    yield f"\n{_FOOT}"


def _group(group: str, actions: Mapping[str, Action], names: Sequence[str]) -> Iterator[str]:
    """Yield every setting of a group with its whole text."""
    yield f"settings of {group}:" if group != "run" else "settings of the run:"
    for name in names:
        if (name.partition(".")[0] if "." in name else "run") == group:
            yield f"  {_usage(name)}"
            text = _whole_text(name, actions[name])
            yield textwrap.fill(text, width=_WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _whole_text(name: str, action: Action) -> str:
    """Return the text of a setting with its choices and its default."""
    text, default = _text(action), action.default
    choices = [option for kind in _stated(setting_types()[name]) for option in _options(kind)]
    if len(choices) > 1:
        text += f" One of {', '.join(choices)}."
    if default is not None and default != {} and "Default:" not in text:
        text += f" Default: {str(default).lower() if isinstance(default, bool) else default}."
    return text


def _row(usage: str, text: str) -> str:
    indent = " " * (_COLUMN + 3)
    return textwrap.fill(f"  {usage:<{_COLUMN}} {text}", width=_WIDTH, subsequent_indent=indent)


def _summary(action: Action) -> str:
    """Return the first sentence of a setting's text with its default; the rest is a group's help."""
    text, default = _text(action), action.default
    first = text.partition(". ")[0].rstrip(".").partition(";")[0]
    choices = [option for kind in _stated(setting_types()[action.dest]) for option in _options(kind)]
    named = f": {', '.join(choices)}" if len(choices) > 1 else ""
    stated = text.partition("Default: ")[2].rstrip(".") if default is None else default
    return f"{first}{named} ({stated})"


def _text(action: Action) -> str:
    return " ".join((action.help or "").split())


def _usage(name: str, action: Action | None = None) -> str:
    """Return an option with what it takes: --max-samples N."""
    if action is not None and action.nargs == 0:
        return as_option(name)
    kind = setting_types().get(name, {"replicas": int, "max_restarts": int, "grace": float}.get(name, str))
    return f"{as_option(name)} {_PLACES.get(name) or '|'.join(_kind(choice) for choice in _stated(kind))}"


def _stated(kind: Any) -> list[Any]:  # noqa: ANN401 - a type hint has no type of its own
    return [choice for choice in choices_of(kind) if choice is not type(None)]


def _options(kind: Any) -> tuple[str, ...]:  # noqa: ANN401 - a type hint has no type of its own
    return get_args(kind) if get_origin(kind) is Literal else ()


def _kind(choice: Any) -> str:  # noqa: ANN401 - a type hint has no type of its own
    if options := _options(choice):
        return "NAME" if len(options) > 1 else options[0]
    return _KINDS.get(get_origin(choice) or choice, "VALUE")
