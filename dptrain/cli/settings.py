"""Settings of `dptrain train` from file and command line; what is wrong with them is said in one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dptrain.errors import ConfigError
from dptrain.train.config import TrainConfig

_DESCRIPTION = """Train a task on all replicas, measure the gradient noise scale on the way, and adapt the batch to it.
Settings come from --config, then from the command line, the later one wins; --print_config shows them."""

_SURE = 0.7  # likeness of two names of one part; below it they have but some letters in common


def parse(arguments: Sequence[str]) -> tuple[TrainConfig, Namespace]:
    """Return the settings, and the options that are of this call alone (`replicas`, `resume`).

    Raises:
        ConfigError: in one sentence, with the nearest name for a misspelt one.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="dptrain train", description=_DESCRIPTION, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with settings; a run folder's config.yaml is one.")
    parser.add_argument("--replicas", type=int | None, help="Replicas to start. Default: one per GPU, else 2 on CPU.")
    parser.add_argument(
        "--resume", action="store_true", help="Go on from the newest checkpoint in run_dir, with the run's settings."
    )
    parser.add_class_arguments(TrainConfig)
    arguments = _with_saved_settings(list(arguments))
    known = [action.dest for action in parser._actions if action.dest != "help"]  # noqa: SLF001 - argparse has no other way
    for path in _values("--config", arguments):
        _check_names(_settings_in(Path(path)), known=known, file=path)
    try:
        parsed = parser.parse_args(arguments)
        settings = (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(parsed)
    except (ArgumentError, OSError, UnicodeError) as error:
        raise ConfigError(_sentence(str(error), known=known)) from None
    names = [field.name for field in fields(TrainConfig)]
    return TrainConfig(**{name: settings[name] for name in names}), parsed


def _with_saved_settings(arguments: list[str]) -> list[str]:
    """Where a run is resumed and no settings file is named, put the run's own first, so that the rest overrides it."""
    run_dirs = _values("--run_dir", arguments)
    if "--resume" not in arguments or _values("--config", arguments) or not run_dirs:
        return arguments
    saved = Path(run_dirs[-1]) / "config.yaml"
    return ["--config", str(saved), *arguments] if saved.is_file() else arguments


def _values(option: str, arguments: Sequence[str]) -> list[str]:
    """Return what is given to an option, as `--option value` and as `--option=value`."""
    apart = [value for argument, value in pairwise(arguments) if argument == option]
    return apart + [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{option}=")]


def _settings_in(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read settings file {path}: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        line = f" in line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise ConfigError(f"settings file {path} is not YAML{line}: {getattr(error, 'problem', error)}") from None
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else repr(settings)
        raise ConfigError(f"settings file {path} must hold names with values, such as `task: digits`, got {found}")
    return settings


def _check_names(settings: Mapping[str, Any], *, known: Sequence[str], file: str, prefix: str = "") -> None:
    """Refuse names in a settings file that do not exist, and values where there should be a group of settings."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if name in _groups(known):
            if not isinstance(value, dict):
                raise ConfigError(f"{name} in {file} must be a group of settings, got {value!r}")
            _check_names(value, known=known, file=file, prefix=f"{name}.")
        elif name not in known:
            raise ConfigError(f"there is no setting {name}, in {file}{_nearest(name, known)}")


def _groups(known: Sequence[str]) -> set[str]:
    return {name.partition(".")[0] for name in known if "." in name}


def _sentence(message: str, *, known: Sequence[str]) -> str:
    """Turn the parser's message into one sentence.

    It speaks of unions and classes in several lines; a user needs the name, what is expected and what was given.
    """
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        return _unknown(match[1].split()[0].partition("=")[0], known=known)
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        name = f"{match[1]}.{match[2]}"
        return f"there is no setting {name}{_nearest(name, known)}"
    if match := re.search(r'[Pp]arser key "([^"]+)":(.*)', message, re.DOTALL):
        return _wrong_value(match[1], match[2], known=known)
    return _one_line(message)


def _unknown(argument: str, *, known: Sequence[str]) -> str:
    if not argument.startswith("-"):
        return f"there is no place for {argument!r}: settings are written --name value"
    return f"there is no option {argument}{_nearest(argument.lstrip('-'), known, prefix='--')}"


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
        return f"{name} must be {' or '.join(expected)}, got {value[1].strip()!r}"
    if (choices := re.search(r"Literal\[(.*?)\]", message)) and value:
        return f"{name} must be one of {choices[1]}, got {value[1].strip()!r}"
    return f"{name}: {_one_line(message)}"


def _nearest(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    """Return "; did you mean …?", by the whole name or by its last part."""
    leaf = _leaf(name)
    leaves = difflib.get_close_matches(leaf, dict.fromkeys(map(_leaf, known)), n=1, cutoff=_SURE)
    close = [setting for setting in known if _leaf(setting) in leaves]
    close = close or [setting for setting in known if _letters(leaf) in _letters(setting)]
    best = difflib.get_close_matches(name, close, n=1, cutoff=0)
    return f"; did you mean {prefix}{best[0]}?" if best else ""


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _letters(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _one_line(text: str) -> str:
    return " ".join(text.split())
