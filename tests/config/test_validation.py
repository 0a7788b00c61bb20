"""Domains: what fits a field passes, what does not is named by its dotted path; the settings themselves are fuzzed."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from dptrain.config.validation import check_ranges, check_types, leaves
from dptrain.errors import ConfigError
from dptrain.ranges import POSITIVE, Range, setting


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float | None = None
    on: bool = True


@dataclass(frozen=True, kw_only=True)
class Outer:
    count: int = 0
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    more: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


class Kind(enum.StrEnum):
    A = "a"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"count": -(2**63) + 1, "name": None, "kind": "b"},
        {"inner": {"rate": 3}},
        {"inner": Inner(rate=0.5)},
        {"more": {"a": [1, None, True, 2.5, {"b": "ä"}]}},
        {"of": "somebody else"},
    ],
)
def test_what_fits_its_field_passes(settings):
    """Values of the type, whole numbers for a float, groups as mapping or instance; other names are not looked at."""
    check_types(Outer, settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"count": "1"}, "count must be int, got '1'"),
        ({"count": True}, "count must be int, got True"),
        ({"count": np.int64(3)}, "count must be int, got np.int64(3)"),
        ({"count": 2**63}, "count must be int below 2⁶³, got 9223372036854775808"),
        ({"count": 10**5000}, "count must be int below 2⁶³, got a number with thousands of digits"),
        ({"name": "\udcff"}, "name must be str or null that has a UTF-8 form, got '\\udcff'"),
        ({"name": "x" * 500}, None),
        ({"kind": "c"}, "kind must be one of 'a', 'b', got 'c'"),
        ({"kind": Kind.A}, "kind must be one of 'a', 'b'"),
        ({"inner": 3}, "inner must be a group of settings, got 3"),
        ({"inner": {"rate": "fast"}}, "inner.rate must be float or null, got 'fast'"),
        ({"inner": {"rate": math.nan}}, "inner.rate must be float or null and finite, got nan"),
        ({"inner": {"rate": np.float64(1)}}, "inner.rate must be float or null, got np.float64(1.0)"),
        ({"inner": Inner(on=1)}, "inner.on must be bool, got 1"),
        ({"more": []}, "more must be dict, got []"),
        ({"more": {1: 2}}, "the names in more must be text, got 1"),
        ({"more": {"a": {"b": [0, (1, 2)]}}}, "more.a.b.1 must be plain data"),
        ({"more": {"a": math.inf}}, "more.a must be plain data"),
        ({"more": {"a": 2**63}}, "more.a must be plain data"),
        ({"more": {"a": Kind.A}}, "more.a must be plain data"),
    ],
)
def test_what_does_not_fit_is_named_with_its_value(settings, sentence):
    """Types are exact: what only looks like one could not be written to a file and read back."""
    if sentence is None:
        check_types(Outer, settings)
        return
    with pytest.raises(ConfigError) as caught:
        check_types(Outer, settings)
    assert str(caught.value).startswith(sentence)


def test_a_group_inside_itself_is_refused():
    """Plain data has an end."""
    endless = {}
    endless["again"] = endless
    with pytest.raises(ConfigError, match="more than 32 groups deep"):
        check_types(Outer, {"more": endless})


def test_ranges_are_checked_by_dotted_name():
    """A value out of its range is named with what it must be; what is not set is in every range."""

    @dataclass(frozen=True, kw_only=True)
    class Rated:
        rate: float | None = setting(None, POSITIVE)

    @dataclass(frozen=True, kw_only=True)
    class Counted:
        count: int = setting(0, Range(text="even", holds=lambda value: value % 2 == 0))
        inner: Rated = field(default_factory=Rated)

    check_ranges(Counted(count=2))
    with pytest.raises(ConfigError, match=r"^count must be even, got 3$"):
        check_ranges(Counted(count=3))
    with pytest.raises(ConfigError, match=r"^inner.rate must be positive, got -1.0$"):
        check_ranges(Counted(inner=Rated(rate=-1.0)))


def test_a_tree_is_laid_flat():
    """An empty group is a value of its own."""
    assert leaves({"a": 1, "b": {"c": {"d": 2}, "e": {}}}) == {"a": 1, "b.c.d": 2, "b.e": {}}
