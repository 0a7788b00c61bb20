"""Settings of `dptrain train` from file and command line; what is wrong with them is said in one sentence."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader, set_parsing_settings

from dptrain.config.settings_file import (
    build_config,
    nearest,
    read_settings,
    setting_names,
    settings_text,
    value_in,
)
from dptrain.config.train_config import TrainConfig
from dptrain.config.validation import shown
from dptrain.errors import ConfigError
from dptrain.tracking.redact import refuse_secrets

_DESCRIPTION = """Train a task on all replicas, measure the gradient noise scale on the way, and adapt the batch to it.
Settings come from the --config files in their order, then from the command line; the later one wins. The environment
sets none of them. --print_config shows what comes out."""

_OPTIONS = "config", "print_config"  # of the parser itself; the rest that is no setting goes to the caller


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, Namespace]:
    """Return the settings, and the options that are of this call alone (`replicas`, `resume`, …).

    Raises:
        ConfigError: in one sentence, with the nearest name for a misspelt one.
        SystemExit: where help or the settings were asked for, and shown.
    """
    arguments = list(arguments)
    settings: dict[str, Any] = {}
    for path in _settings_files(arguments):
        settings = _merged(settings, read_settings(path))
    parser = _parser()
    names = setting_names()
    try:
        # Without defaults: only what was given. The files do not go through here, because the parser is lenient.
        parsed = parser.parse_args(arguments, defaults=False, env=False)
    except (ArgumentError, UnicodeError) as error:
        raise ConfigError(_sentence(str(error), known=[*names, *_options(parser)])) from None
    given = parsed.as_dict()
    groups = {name.partition(".")[0] for name in names}
    config = build_config(_merged(settings, {name: value for name, value in given.items() if name in groups}))
    refuse_secrets(config)
    if given.get("print_config"):
        sys.stdout.write(settings_text(config))
        raise SystemExit(0)
    options = {name: given.get(name, default) for name, default in _options(parser).items()}
    return config, Namespace(options)  # type: ignore[no-untyped-call]


def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("dptrain", value_in, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog="dptrain train",
        description=_DESCRIPTION,
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
        parser_mode="dptrain",
    )
    config = "YAML file with settings, more than once if need be; a run folder's config.yaml is one."
    parser.add_argument("--config", type=str, action="append", help=config)
    parser.add_argument("--print_config", action="store_true", help="Show the settings as such a file, and end.")
    parser.add_argument("--replicas", type=int | None, help="Replicas to start. Default: one per GPU, else 2 on CPU.")
    restarts = "How often replicas are started again after a fault that may pass."
    parser.add_argument("--max_restarts", "--max-restarts", type=int | None, help=restarts)
    parser.add_argument("--grace", type=float | None, help="Seconds from a request to stop to the end of the replicas.")
    parser.add_argument(
        "--resume", action="store_true", help="Go on from the newest checkpoint in run_dir, with the run's settings."
    )
    fresh = "With --resume: begin anew where there are checkpoints and none of them can be trusted."
    parser.add_argument("--allow_fresh", "--allow-fresh", action="store_true", help=fresh)
    parser.add_class_arguments(TrainConfig)
    return parser


def _settings_files(arguments: Sequence[str]) -> list[Path]:
    """Return the files named, or where a run is resumed and none is named, the run's own."""
    named = _values("--config", arguments)
    run_dirs = _values("--run_dir", arguments)
    if "--resume" in arguments and run_dirs and not named:
        saved = Path(run_dirs[-1]) / "config.yaml"
        with contextlib.suppress(OSError):  # a name that no folder can have: whoever opens the folder says so
            return [saved] if saved.is_file() else []
    return [Path(name) for name in named]


def _values(option: str, arguments: Sequence[str]) -> list[str]:
    """Return what is given to an option, as `--option value` and as `--option=value`, in the order given."""
    return [
        value if argument == option else argument.partition("=")[2]
        for argument, value in pairwise([*arguments, ""])
        if argument == option or argument.startswith(f"{option}=")
    ]


def _merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree in which the later one wins, name by name."""
    merged = dict(before)
    for name, value in after.items():
        earlier = merged.get(name)
        merged[name] = _merged(earlier, value) if isinstance(earlier, dict) and isinstance(value, dict) else value
    return merged


def _options(parser: ArgumentParser) -> dict[str, Any]:
    """Return the options that are no settings, with their defaults."""
    settings = {name.partition(".")[0] for name in setting_names()}
    actions = [action for action in parser._actions if action.dest.partition(".")[0] not in settings]  # noqa: SLF001 - argparse has no other way
    return {action.dest: action.default for action in actions if action.dest not in ("help", *_OPTIONS)}


def _sentence(message: str, *, known: Sequence[str]) -> str:
    """Turn the parser's message into one sentence.

    It speaks of unions and classes in several lines; a user needs the name, what is expected and what was given.
    """
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        return _unknown(match[1].split()[0].partition("=")[0], known=known)
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        name = f"{match[1]}.{match[2]}"
        return f"there is no setting {name}{nearest(name, known)}"
    if match := re.search(r'[Pp]arser key "([^"]+)":(.*)', message, re.DOTALL):
        return _wrong_value(match[1], match[2], known=known)
    return _one_line(message)


def _unknown(argument: str, *, known: Sequence[str]) -> str:
    if not argument.startswith("-"):
        return f"there is no place for {argument!r}: settings are written --name value"
    return f"there is no option {argument}{nearest(argument.lstrip('-'), known, prefix='--')}"


def _wrong_value(name: str, message: str, *, known: Sequence[str]) -> str:
    """Say what a setting must be, from what the parser says of each type that it tried."""
    if "Unable to load config" in message:
        example = next(setting for setting in known if setting.startswith(f"{name}."))
        return f"{name} is a group of settings: set each by its name, such as --{example}"
    expected = dict.fromkeys(
        found.replace("NoneType", "null") for found in re.findall(r"Expected an? <class '([\w.]+)'>", message)
    )
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if expected and value:
        return f"{name} must be {' or '.join(expected)}, got {shown(value[1].strip())}"
    if (choices := re.search(r"Literal\[(.*?)\]", message)) and value:
        return f"{name} must be one of {choices[1]}, got {shown(value[1].strip())}"
    return f"{name}: {_one_line(message)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
