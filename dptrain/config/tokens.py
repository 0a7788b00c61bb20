"""Settings that are given in tokens, and what they are in samples; how many a sample holds, the task says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from dptrain.config.batch_schedule import converted
from dptrain.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")
"""The settings of a run, or a group of them."""

IN_SAMPLES: Mapping[str, str] = {
    "max_tokens": "max_samples",
    "global_batch_tokens": "global_batch_size",
    "control.smallest_tokens": "control.smallest",
    "control.largest_tokens": "control.largest",
    "control.schedule_tokens": "control.schedule",
    "optimizer.reference_batch_tokens": "optimizer.reference_batch_size",
    "optimizer.warmup_tokens": "optimizer.warmup_samples",
    "checkpoint.every_tokens": "checkpoint.every_samples",
    "log.eval_every_tokens": "log.eval_every_samples",
}
"""Each setting in tokens, and its counterpart in samples."""


def check_units(config: DataclassInstance) -> None:
    """Refuse a setting that is given in both units.

    Raises:
        ConfigError: naming both.
    """
    for name, tokens in _given(config):
        samples = _value(config, IN_SAMPLES[name])
        if samples is not None:
            raise ConfigError(f"{name}={tokens} and {IN_SAMPLES[name]}={samples} are the same setting: leave one out")


def check_in_samples(config: DataclassInstance) -> None:
    """Refuse settings in tokens where no task is at hand that says how many a sample has.

    Raises:
        ConfigError: naming the first of them.
    """
    for name, tokens in _given(config):
        raise ConfigError(f"{name}={tokens} can be used in `dptrain train` alone: give {IN_SAMPLES[name]} here")


def in_samples(config: Config, *, tokens_per_sample: int | None, task: str) -> Config:
    """Return the settings with those in tokens turned into samples, rounded to the nearest whole one, at least 1.

    Args:
        config: the settings.
        tokens_per_sample: of the task; None where its samples are not made of tokens.
        task: its name.

    Raises:
        ConfigError: where a setting is in tokens and the task has none.
    """
    for name, tokens in _given(config):
        if tokens_per_sample is None:
            raise ConfigError(
                f"{name}={tokens} counts in tokens, and task {task!r} does not say how many a sample has: give "
                f"{IN_SAMPLES[name]}, or tokens_per_sample in the task"
            )
        group, _, field = name.rpartition(".")
        counterpart = IN_SAMPLES[name].rpartition(".")[2]
        rounded = partial(_rounded, tokens_per_sample=tokens_per_sample)
        changes = {field: None, counterpart: converted(tokens, rounded) if isinstance(tokens, str) else rounded(tokens)}
        config = replace(config, **({group: replace(getattr(config, group), **changes)} if group else changes))
    return config


def _rounded(tokens: int, *, tokens_per_sample: int) -> int:
    # A warm-up, or the beginning of a schedule, may be none at all.
    return max(min(tokens, 1), (2 * tokens + tokens_per_sample) // (2 * tokens_per_sample))


def _given(config: DataclassInstance) -> Iterator[tuple[str, int | str]]:
    for name in IN_SAMPLES:
        value = _value(config, name)
        if value is not None:
            yield name, value


def _value(config: Any, name: str) -> Any:  # noqa: ANN401 - of any setting
    for part in name.split("."):
        config = getattr(config, part)
    return config
