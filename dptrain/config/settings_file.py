"""Settings as YAML: read strictly, and written so that they are read as they were; the command line is not known here.

What is read is the core of YAML 1.2, in which `no` is text and `1e3` a number: none of the readings of YAML 1.1 that
surprise (no → false, 010 → 8, 1:30 → 90, 2026-01-01 → a date) is left. There is no alias, no tag and no name twice.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from dptrain.config.counts import with_counts
from dptrain.config.train_config import TrainConfig
from dptrain.config.validation import check_types, hints_of, is_group
from dptrain.error_text import shown
from dptrain.errors import ConfigError

LARGEST_BYTES = 2**20
"""Of a settings file. One with every setting in it has 2 KiB."""

_MOVED: Mapping[str, str] = {
    "control.ratio": "control.law_options.ratio",
    "control.samples_per_step": "control.law_options.samples_per_step",
}
"""Settings of earlier versions, by where they are now."""
_SURE = 0.7  # likeness of two names of one part; below it they have but some letters in common


def settings_text(config: TrainConfig) -> str:
    """Write settings as YAML that `read_settings`, and any other reader of YAML 1.1 or 1.2, reads as they are."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a settings file as a tree of settings that exist, each with a value of its type.

    Raises:
        ConfigError: where it cannot be read, is larger than `LARGEST_BYTES`, or holds anything else.
    """
    try:
        with path.open("rb") as file:  # read once and up to a limit: it may be a pipe, or have no end
            content = file.read(LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:  # a path with a NUL in it is a ValueError
        raise ConfigError(f"cannot read settings file {path}: {getattr(error, 'strerror', None) or error}") from None
    settings = _without_moved(_nested(_loaded(content, path), path))
    _check_names(settings, file=path)
    settings = with_counts(TrainConfig, settings)
    check_types(TrainConfig, settings)
    return settings


def build_config(settings: Mapping[str, Any]) -> TrainConfig:
    """Make settings of a tree.

    Raises:
        ConfigError: with dotted name and value.
    """
    check_types(TrainConfig, settings)
    hints = hints_of(TrainConfig)
    built = {name: hints[name](**value) if is_group(hints[name]) else value for name, value in settings.items()}
    return TrainConfig(**built)


def value_in(text: str) -> Any:  # noqa: ANN401 - any plain data
    """Read one value, as a settings file would have it.

    Raises:
        YAMLError: where it is none.
    """
    try:
        return _Loader(text).get_single_data()
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from None


def setting_types() -> dict[str, Any]:
    """Return the type of every setting by its dotted name."""
    return {
        f"{name}.{inner}" if inner else name: kind
        for name, hint in hints_of(TrainConfig).items()
        for inner, kind in (hints_of(hint).items() if is_group(hint) else [("", hint)])
    }


def setting_names() -> list[str]:
    """Return the dotted name of every setting."""
    return list(setting_types())


def nearest(name: str, known: Sequence[str], *, prefix: str = "") -> str:
    """Return "; did you mean …?", by the whole name or by its last part; nothing where no name is near."""
    if name in _MOVED:
        return f"; it is {prefix}{_MOVED[name]} now"
    leaf = _leaf(name)
    leaves = difflib.get_close_matches(leaf, dict.fromkeys(map(_leaf, known)), n=1, cutoff=_SURE)
    close = [setting for setting in known if _leaf(setting) in leaves]
    close = close or [setting for setting in known if _letters(leaf) in _letters(setting)]
    best = difflib.get_close_matches(name, close, n=1, cutoff=0)
    return f"; did you mean {prefix}{best[0]}?" if best else ""


def _without_moved(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what an earlier version wrote for a setting that was not given."""
    return {
        group: {name: value for name, value in within.items() if value is not None or f"{group}.{name}" not in _MOVED}
        if isinstance(within, dict)
        else within
        for group, within in settings.items()
    }


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _letters(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _nested(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return settings with each dotted name, such as `control.law`, in its group: errors and options write it so."""
    groups = {name.partition(".")[0] for name in setting_names() if "." in name}
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        group, dot, inner = name.partition(".") if isinstance(name, str) else (name, "", "")
        if not dot or group not in groups:
            nested[name] = {**nested[name], **_disjoint(value, nested[name], name, path)} if name in nested else value
            continue
        within = nested.setdefault(group, {})
        if not isinstance(within, dict):
            raise ConfigError(f"{group} in {path} must be a group of settings, got {shown(within)}")
        nested[group] = {**within, **_disjoint({inner: value}, within, group, path)}
    return nested


def _disjoint(added: object, present: Mapping[str, Any], group: str, path: Path) -> dict[str, Any]:
    """Refuse a setting that a file has twice, once as a group and once by its dotted name."""
    if not isinstance(added, dict):
        raise ConfigError(f"{group} in {path} must be a group of settings, got {shown(added)}")
    twice = next((name for name in added if name in present), None)
    if twice is not None:
        raise ConfigError(f"settings file {path} has {group}.{twice} twice")
    return added


def _check_names(settings: Mapping[str, Any], *, file: Path) -> None:
    """Refuse names that do not exist, and values where there should be a group of settings."""
    known = setting_names()
    groups = {name.partition(".")[0] for name in known if "." in name}
    for name, value in settings.items():
        if name in groups and not isinstance(value, dict):
            raise ConfigError(f"{name} in {file} must be a group of settings, got {shown(value)}")
        inner = [f"{name}.{key}" for key in value] if name in groups else [name]
        unknown = next((path for path in inner if path not in known), None)
        if unknown is not None:
            raise ConfigError(f"there is no setting {unknown}, in {file}{nearest(str(unknown), known)}")


def _loaded(content: bytes, path: Path) -> dict[str, Any]:
    if len(content) > LARGEST_BYTES:
        raise ConfigError(f"settings file {path} has more than {LARGEST_BYTES:,} bytes: is it one?")
    try:
        loader = _Loader(content.decode("utf-8"))
        settings = loader.get_single_data()
    except _RefusedError as error:
        raise ConfigError(f"settings file {path} has {error.problem}{_line(error)}") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"settings file {path} is not YAML{_line(error)}: {problem}") from None
    except UnicodeError:
        raise ConfigError(f"settings file {path} is not UTF-8 text") from None
    except ValueError:  # Python's limit on the digits of a whole number
        raise ConfigError(f"settings file {path} has a number with thousands of digits") from None
    except RecursionError:
        raise ConfigError(f"settings file {path} has groups within groups without end") from None
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else shown(settings)
        raise ConfigError(f"settings file {path} must hold names with values, such as `task: digits`, got {found}")
    return settings


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" in line {mark.line + 1}" if mark else ""


_WHOLE = r"(?:0|[1-9][0-9_]*)"  # 010 is eight to one reader and ten to another: it is no number here
_POINT = rf"(?:{_WHOLE}\.[0-9_]*|\.[0-9][0-9_]*)"
_RESOLVED = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": rf"[-+]?{_WHOLE}",
    "float": rf"[-+]?(?:{_POINT}(?:[eE][-+]?[0-9]+)?|{_WHOLE}[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
}


class _RefusedError(yaml.MarkedYAMLError):
    """It is YAML, but nothing that a settings file needs."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way; filled below

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):  # nine lines of which can stand for 10⁹ values
            raise _RefusedError(None, None, f"an alias, *{event.anchor},", event.start_mark)  # type: ignore[arg-type]
        if getattr(event, "tag", None) is not None:
            raise _RefusedError(None, None, f"a tag, {event.tag},", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002 - PyYAML's form
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise _RefusedError(None, None, f"{key} twice, again", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes round every text that YAML 1.1, or what is read here, would take for something else."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        """Write text that has line ends or control characters with escapes: unescaped, some come back as spaces."""
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


for _name, _pattern in _RESOLVED.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), None)
