"""Settings of `dptrain train` from files and command line; each error is one sentence with the nearest right name."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader, set_parsing_settings

from dptrain.cli.help import show_help
from dptrain.cli.hints import refuse_other_tools
from dptrain.cli.spelling import as_option, underscored, with_numbers
from dptrain.config.resume_check import LENGTHS
from dptrain.config.settings_file import (
    build_config,
    nearest,
    read_settings,
    setting_types,
    settings_text,
    value_in,
)
from dptrain.config.tokens import IN_SAMPLES
from dptrain.config.train_config import TrainConfig
from dptrain.error_text import shown
from dptrain.errors import ConfigError, DptrainError
from dptrain.tracking.redact import refuse_secrets

_OPTIONS = "config", "print_config"  # of the parser itself; the rest that is no setting goes to the caller


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, Namespace]:
    """Return the settings, and the options that are of this call alone (`replicas`, `resume`, …).

    Names of options may have dashes or underscores; numbers may be written as 1e5, 100k or 1M.

    Raises:
        ConfigError: in one sentence, with the nearest name for a misspelt one.
        SystemExit: after help or the settings were printed, as asked for.
    """
    parser = _parser()
    types = setting_types()
    known = [*types, *_options(parser)]
    arguments = underscored(arguments)
    show_help(arguments, parser)
    refuse_other_tools(arguments, known=known, num_samples=_num_samples)
    arguments = with_numbers(arguments, types={**types, "replicas": int, "max_restarts": int})
    settings: dict[str, Any] = {}
    for path in _settings_files(arguments):
        settings = _replaced(settings, read_settings(path))
    try:
        # Without defaults: only what was given. The files do not go through here, because the parser is lenient.
        parsed = parser.parse_args(arguments, defaults=False, env=False)
    except (ArgumentError, UnicodeError) as error:
        raise ConfigError(_sentence(str(error), known=known)) from None
    given = parsed.as_dict()
    groups = {name.partition(".")[0] for name in types}
    config = build_config(_replaced(settings, {name: value for name, value in given.items() if name in groups}))
    refuse_secrets(config)
    if given.get("print_config"):
        _print_config(config)
    options = {name: given.get(name, default) for name, default in _options(parser).items()}
    return config, Namespace(options)  # type: ignore[no-untyped-call]


def _print_config(config: TrainConfig) -> NoReturn:
    from dptrain.tasks.resolve import check_task_name

    check_task_name(config.task, options=config.task_options)
    sys.stdout.write(settings_text(config))
    raise SystemExit(0)


def _num_samples(arguments: Sequence[str]) -> tuple[str, int] | None:
    """Return the name of the task that the arguments ask for and the length of its data; None where it has none."""
    from dptrain.tasks.resolve import resolve_task

    try:
        config, _ = parse(arguments)
        task = resolve_task(config.task, options=config.task_options)
        return task.name, len(task.train_data)  # type: ignore[arg-type]
    except (DptrainError, SystemExit):
        return None


@functools.cache  # it takes 0.2 s of CPU time, and a refusal reads the arguments again for the length of the data
def _parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("dptrain", value_in, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(
        prog="dptrain train",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
        parser_mode="dptrain",
        add_help=False,
    )
    config = "YAML file with settings, may be given several times; the config.yaml of a run folder is one"
    parser.add_argument("--config", type=str, action="append", help=config)
    parser.add_argument("--print_config", action="store_true", help="print the settings as such a file, and end")
    parser.add_argument("--replicas", type=int | None, help="processes to start (one per GPU, else 2 on the CPU)")
    restarts = "most restarts after faults that may pass (no limit while checkpoints advance)"
    parser.add_argument("--max_restarts", type=int | None, help=restarts)
    parser.add_argument("--grace", type=float | None, help="seconds from a stop request to the kill (30)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --run-dir")
    fresh = "with --resume: start over where no checkpoint can be trusted"
    parser.add_argument("--allow_fresh", action="store_true", help=fresh)
    parser.add_class_arguments(TrainConfig)
    return parser


def _settings_files(arguments: Sequence[str]) -> list[Path]:
    """Return the files named, or where a run is resumed and none is named, the run's own."""
    named = _values("--config", arguments)
    run_dirs = _values("--run_dir", arguments)
    if "--resume" in arguments and run_dirs and not named:
        saved = Path(run_dirs[-1]) / "config.yaml"
        with contextlib.suppress(OSError):  # no folder can have this name; the error follows when it is opened
            if saved.is_file():
                return [saved]
            if (saved.parent / "checkpoints").is_dir() and not _values("--task", arguments):
                raise ConfigError(
                    f"{saved} is missing, so the settings of this run are not known: give them as at its start, with "
                    "--task and the other options or with --config"
                )
            return []
    return [Path(name) for name in named]


def _values(option: str, arguments: Sequence[str]) -> list[str]:
    """Return what is given to an option, as `--option value` and as `--option=value`, in the order given."""
    return [
        value if argument == option else argument.partition("=")[2]
        for argument, value in pairwise([*arguments, ""])
        if argument == option or argument.startswith(f"{option}=")
    ]


_SAME = LENGTHS, *IN_SAMPLES.items()
"""Names of settings that say the same thing in other units: whichever of them comes last is meant."""


def _replaced(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tree in which the later one wins, also over what the earlier one says in another unit.

    A run's own `config.yaml` holds all settings in samples, whatever they were given in.
    """
    left = {name: dict(value) if isinstance(value, dict) else value for name, value in before.items()}
    for names in _SAME:
        for name in names if any(_value(after, name) is not None for name in names) else ():
            group, _, last = name.rpartition(".")
            within = left.get(group) if group else left
            if isinstance(within, dict):
                within.pop(last, None)
    return _merged(left, after)


def _value(settings: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - of any setting
    found: Any = settings
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _merged(
    before: Mapping[str, Any], after: Mapping[str, Any], *, groups: Collection[str] | None = None
) -> dict[str, Any]:
    """Return a tree in which the later one wins, name by name.

    An empty mapping empties a setting that is one, such as `control.law_options`; an empty group of settings changes
    none of them.
    """
    if groups is None:
        groups = {name.partition(".")[0] for name in setting_types() if "." in name}
    merged = dict(before)
    for name, value in after.items():
        earlier = merged.get(name)
        if isinstance(earlier, dict) and isinstance(value, dict) and (value or name in groups):
            merged[name] = _merged(earlier, value, groups=())
        else:
            merged[name] = value
    return merged


def _options(parser: ArgumentParser) -> dict[str, Any]:
    """Return the options that are no settings, with their defaults."""
    settings = {name.partition(".")[0] for name in setting_types()}
    actions = [action for action in parser._actions if action.dest.partition(".")[0] not in settings]  # noqa: SLF001 - argparse has no other way
    return {action.dest: action.default for action in actions if action.dest not in _OPTIONS}


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
        hint = f"--task {argument}" if argument.endswith(".py") or ":" in argument or argument.isidentifier() else ""
        return f"there is no place for {argument!r}: settings are written --name value{hint and f', such as {hint}'}"
    name = argument.lstrip("-")
    close = nearest(name, known, prefix="--").replace("_", "-")
    return f"there is no option {argument.replace('_', '-')}{close}"


def _wrong_value(name: str, message: str, *, known: Sequence[str]) -> str:
    """Say what a setting must be, from what the parser says of each type that it tried."""
    if "Unable to load config" in message:
        example = next(setting for setting in known if setting.startswith(f"{name}."))
        return f"{name} is a group of settings: set each by its name, such as {as_option(example)}"
    choices = re.search(r"Literal\[(.*?)\]", message)
    types = [kind.replace("NoneType", "null") for kind in re.findall(r"Expected an? <class '([\w.]+)'>", message)]
    expected = dict.fromkeys(kind for kind in types if kind != "null")
    expected |= dict.fromkeys([f"one of {choices[1]}"] if choices else [])
    expected |= dict.fromkeys(kind for kind in types if kind == "null")
    value = re.search(r"(?:Given value|Got value): (.*)", message)
    if expected and value:
        return f"{name} must be {' or '.join(expected)}, got {shown(value[1].strip())}"
    return f"{name}: {_one_line(message)}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
