"""From the settings of `exchange` to an exchange, and what kinds cannot do together with other settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from dptrain.errors import ConfigError
from dptrain.exchange.all_reduce import AllReduce, ExpertParallel
from dptrain.exchange.base import Exchange
from dptrain.exchange.codistillation import Codistillation
from dptrain.exchange.compressed import Compressed
from dptrain.exchange.ensemble import Ensemble
from dptrain.exchange.local_updates import LocalUpdates
from dptrain.exchange.random_bases import RandomBases
from dptrain.exchange.settings import ExchangeConfig

_MAKERS: Mapping[str, tuple[Callable[..., Exchange], tuple[str, ...]]] = MappingProxyType(
    {
        "all_reduce": (AllReduce, ()),
        "compressed": (Compressed, ("codec", "rank", "error_feedback")),
        "random_bases": (RandomBases, ("dimensions", "redraw")),
        "local_updates": (LocalUpdates, ("every", "outer", "outer_learning_rate", "outer_momentum", "overlap")),
        "codistillation": (Codistillation, ("weight", "staleness", "predictions")),
        "ensemble": (Ensemble, ("predictions",)),
    }
)
"""The class of each kind, and the settings that are its arguments."""
_OF_THE_LOOP: Mapping[str, tuple[str, ...]] = MappingProxyType({"codistillation": ("shared_samples",)})
"""Settings of a kind that the loop reads."""


def build_exchange(
    config: ExchangeConfig, *, seed: int = 0, registers: bool = True, expert_parallel_size: int = 1
) -> Exchange:
    """Return the exchange that the settings describe, for the default process group.

    Args:
        config: the settings.
        seed: of what a kind draws; equal on all replicas.
        registers: whether a kind registers DDP's communication hook itself.
        expert_parallel_size: replicas that share out the experts of a mixture, for all_reduce.

    Raises:
        ConfigError: where a setting is out of range, or would be ignored.
    """
    make, names = _MAKERS[config.kind]
    check_options(config)
    options: dict[str, Any] = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    if config.kind == "random_bases":
        options["seed"] = seed
    if config.kind == "compressed":
        options["registers"] = registers
    if expert_parallel_size > 1:
        assert config.kind == "all_reduce", "refused before"
        return ExpertParallel(expert_parallel_size)
    return make(**options)


def check_options(config: ExchangeConfig) -> None:
    """Refuse settings that the kind does not read, and values that do not go together.

    Raises:
        ConfigError: naming them.
    """
    read = {"kind", *_MAKERS[config.kind][1], *_OF_THE_LOOP.get(config.kind, ())}
    given = {name: value for name, value in asdict(config).items() if value is not None}
    for name in given.keys() - read:
        kinds = [kind for kind, (_, names) in _MAKERS.items() if name in (*names, *_OF_THE_LOOP.get(kind, ()))]
        raise ConfigError(
            f"exchange.{name} is given, but exchange.kind is {config.kind}: it is for {' and '.join(kinds)}, and would "
            f"be ignored"
        )
    if config.rank is not None and config.codec != "powersgd":
        raise ConfigError(f"exchange.rank is given, but exchange.codec is {config.codec}: it would be ignored")
    if config.outer != "nesterov" and (config.outer_learning_rate, config.outer_momentum) != (None, None):
        raise ConfigError("exchange.outer_learning_rate and outer_momentum are for exchange.outer=nesterov")
    if config.overlap is not None and config.overlap >= (config.every or 8):
        raise ConfigError(f"exchange.overlap {config.overlap} must be below exchange.every {config.every or 8}")


def no_noise_scale(config: ExchangeConfig) -> str | None:
    """Return why the noise scale is not defined under these settings; None where it is."""
    check_options(config)
    return build_exchange(config).no_noise_scale


def parameters_are_equal(config: ExchangeConfig) -> bool:
    """Return whether all replicas have equal parameters after every step."""
    return build_exchange(config).parameters_are_equal
