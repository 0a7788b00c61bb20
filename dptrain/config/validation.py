"""What a setting may hold: its type, from the annotation of its field, and its range; no setting is named here."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from dptrain.error_text import shown
from dptrain.errors import ConfigError
from dptrain.ranges import Range

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_LARGEST = 2**63  # the whole numbers of torch and numpy have 64 bits
_DEEPEST = 32  # groups within groups; what is deeper was not written by a person


def check_types(kind: type, settings: Mapping[str, Any], *, prefix: str = "") -> None:
    """Refuse values that do not have the type of their field.

    The types are exact: a whole number is no text that looks like one, no `true`, and no numpy scalar, which YAML and
    JSON could not write. Numbers are finite and have 64 bits, text has a UTF-8 form, and an open field, one of type
    `dict[str, Any]`, holds plain data only: so settings that pass can be written and read back as they were.

    Args:
        kind: a dataclass of settings; a field may be a dataclass of settings in turn.
        settings: name → value; a group is a mapping or an instance. Names that `kind` lacks are passed over.
        prefix: stands before each name in an error, such as "optimizer.".

    Raises:
        ConfigError: with dotted name and value.
    """
    for name, hint in hints_of(kind).items():
        if name not in settings:
            continue
        path, value = f"{prefix}{name}", settings[name]
        if is_group(hint):
            if not isinstance(value, Mapping | hint):
                raise ConfigError(f"{path} must be a group of settings, got {shown(value)}")
            check_types(hint, value if isinstance(value, Mapping) else vars(value), prefix=f"{path}.")
        elif get_origin(hint) is dict and type(value) is dict:
            _check_plain(value, path)
        elif not any(_is_one(value, choice) for choice in choices_of(hint)):
            raise ConfigError(f"{path} must be {_expected(hint, value)}, got {shown(value)}")


def check_ranges(settings: DataclassInstance, *, prefix: str = "") -> None:
    """Refuse values outside the range that is written on their field; None is always in range.

    Args:
        settings: with types that were checked.
        prefix: stands before each name in an error, such as "optimizer.".

    Raises:
        ConfigError: with dotted name and value.
    """
    for setting in fields(settings):
        path, value = f"{prefix}{setting.name}", getattr(settings, setting.name)
        allowed: Range | None = setting.metadata.get("range")
        if is_dataclass(value) and not isinstance(value, type):
            check_ranges(value, prefix=f"{path}.")
        elif allowed is not None and value is not None and not allowed.holds(value):
            raise ConfigError(f"{path} must be {allowed.text}, got {shown(value)}")


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, by name."""
    return get_type_hints(kind)


def is_group(hint: Any) -> bool:  # noqa: ANN401 - a type hint has no type of its own
    """Whether the values of a field are settings in turn."""
    return is_dataclass(hint)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree by dotted name. An empty group is a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def choices_of(hint: Any) -> tuple[Any, ...]:  # noqa: ANN401 - as above
    """Return the types that a field may have."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_one(value: object, hint: Any) -> bool:  # noqa: ANN401 - as above
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if hint is float and type(value) is int:
        return abs(value) < _LARGEST
    return type(value) is hint and _is_writable(value)


def _is_writable(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)  # halves of a pair have no UTF-8
    return not isinstance(value, int) or abs(value) < _LARGEST


def _expected(hint: Any, value: object) -> str:  # noqa: ANN401 - as above
    names = [
        f"one of {', '.join(map(repr, get_args(choice)))}"
        if get_origin(choice) is Literal
        else "null"
        if choice is type(None)
        else (get_origin(choice) or choice).__name__
        for choice in choices_of(hint)
    ]
    limit = {int: " below 2⁶³", float: " and finite", str: " that has a UTF-8 form"}.get(type(value), "")
    return " or ".join(names) + (limit if not _is_writable(value) else "")


def _check_plain(value: object, path: str, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise ConfigError(f"{shown(path)} lies more than {_DEEPEST} groups deep: settings are no place for data")
    if type(value) is dict:
        for name, child in value.items():
            if type(name) is not str or not _is_writable(name):
                raise ConfigError(f"the names in {path} must be text, got {shown(name)}")
            _check_plain(child, f"{path}.{name}", depth + 1)
    elif type(value) is list:
        for number, child in enumerate(value):
            _check_plain(child, f"{path}.{number}", depth + 1)
    elif not (value is None or (type(value) in (bool, int, float, str) and _is_writable(value))):
        raise ConfigError(
            f"{path} must be plain data (text, true, false, null, a finite number below 2⁶³, a list or a group of "
            f"them), got {shown(value)}"
        )
