"""Which kinds of exchange pay on a network, by the bytes and the round trips that each needs for a step of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dptrain.errors import ConfigError
from dptrain.exchange.base import all_reduce_bytes
from dptrain.exchange.compression.codecs import build_codec

if TYPE_CHECKING:
    from dptrain.explain.record import RunRecord

WORTH = 0.1
"""Part of the time of a step with all_reduce that a kind must save to be worth its trouble."""
SLOWEST_MBIT, FASTEST_MBIT = 1e-3, 1e6
"""Between these bandwidths it is looked for where a kind begins to pay."""
_DIMENSIONS = 256
_MBIT_BYTES = 1e6 / 8


@dataclass(frozen=True, kw_only=True)
class KindPlan:
    """A kind of exchange on a network.

    Attributes:
        settings: as on the command line.
        bytes_per_step: sent by one replica, a mean over steps.
        step_s: estimated time of a step.
        most_steps: how many times the steps of all_reduce it may take to the target and still end as soon.
        pays_below_mbit: bandwidth below which it saves a tenth of a step of all_reduce, `FASTEST_MBIT` where
            it does so at any; None where it never does.
        pays: whether it does at the bandwidth that was asked for.
    """

    settings: str
    bytes_per_step: float
    step_s: float
    most_steps: float
    pays_below_mbit: float | None
    pays: bool


@dataclass(frozen=True, kw_only=True)
class ExchangePlan:
    """What a plan of exchanges says.

    Attributes:
        num_replicas: of the run.
        compute_s: of a step: the run's own, with its own exchange in it.
        mbit_per_s: bandwidth of each replica.
        delay_s: from one replica to another, one way.
        kinds: all_reduce first.
    """

    num_replicas: int
    compute_s: float
    mbit_per_s: float
    delay_s: float
    kinds: Sequence[KindPlan]


def plan_exchange(
    record: RunRecord, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], *, mbit_per_s: float, delay_s: float
) -> ExchangePlan:
    """Estimate the step of each kind: compute, bytes over bandwidth, and 2(K − 1) messages one after the other.

    Nothing overlaps in this model, which is true of the last bucket alone; and each step waits for the round trip of
    the one before, in which replicas agree on stop, loss and batch.

    Args:
        record: the run.
        shapes: name → (shape, type) of the model's parameters.
        mbit_per_s: bandwidth of each replica.
        delay_s: one way.

    Raises:
        ConfigError: where the run has no step times, or one replica alone.
    """
    number = int(record.last("time/world_size", in_summary="world_size") or 1)
    if number < 2:  # noqa: PLR2004 - two are what an exchange needs
        raise ConfigError(f"{record.name} ran on one replica, which exchanges nothing: plan from a run on two or more")
    times = [row["time/step_s"] for row in record.train if row.get("time/step_s")]
    if not times:
        raise ConfigError(f"{record.name} has no step times: plan from a run of this version with log.every_steps=1")
    compute_s = float(statistics.median(times[len(times) // 2 :]))
    tensors = [torch.empty(tuple(shape), dtype=dtype, device="meta") for shape, dtype in shapes.values()]
    whole = all_reduce_bytes(sum(t.numel() * t.element_size() for t in tensors), num_replicas=number)
    network = _Network(compute_s=compute_s, round_s=2 * (number - 1) * delay_s)
    exact = _Need(num_bytes=whole, rounds=1.0)
    kinds = []
    for settings, need in _kinds(tensors, whole=whole, number=number):
        step_s = network.seconds(need, mbit_per_s=mbit_per_s)
        kinds.append(
            KindPlan(
                settings=settings,
                bytes_per_step=need.num_bytes,
                step_s=step_s,
                most_steps=network.seconds(exact, mbit_per_s=mbit_per_s) / step_s,
                pays_below_mbit=network.pays_below(need, exact),
                pays=network.pays(need, exact, mbit_per_s=mbit_per_s),
            )
        )
    return ExchangePlan(num_replicas=number, compute_s=compute_s, mbit_per_s=mbit_per_s, delay_s=delay_s, kinds=kinds)


@dataclass(frozen=True, kw_only=True)
class _Need:
    """What a kind needs of the network in a step: bytes, and rounds of 2(K − 1) messages one after the other."""

    num_bytes: float
    rounds: float


@dataclass(frozen=True, kw_only=True)
class _Network:
    """The time of a step, of which `round_s` is a round of messages without their bytes."""

    compute_s: float
    round_s: float

    def seconds(self, need: _Need, *, mbit_per_s: float) -> float:
        sent_s = need.num_bytes / (mbit_per_s * _MBIT_BYTES)
        return max(self.compute_s + sent_s + need.rounds * self.round_s, self.round_s)

    def pays(self, need: _Need, exact: _Need, *, mbit_per_s: float) -> bool:
        least = (1 - WORTH) * self.seconds(exact, mbit_per_s=mbit_per_s)
        return self.seconds(need, mbit_per_s=mbit_per_s) <= least

    def pays_below(self, need: _Need, exact: _Need) -> float | None:
        """Return the largest bandwidth at which a kind pays, to a thousandth; None where it does at none."""
        slowest, fastest = SLOWEST_MBIT, FASTEST_MBIT
        if not self.pays(need, exact, mbit_per_s=slowest):
            return None
        if self.pays(need, exact, mbit_per_s=fastest):
            return fastest
        while fastest / slowest > 1.001:  # noqa: PLR2004 - a thousandth
            middle = math.sqrt(slowest * fastest)
            slowest, fastest = (middle, fastest) if self.pays(need, exact, mbit_per_s=middle) else (slowest, middle)
        return slowest


def _kinds(tensors: Sequence[Tensor], *, whole: float, number: int) -> list[tuple[str, _Need]]:
    found = [("all_reduce", whole, 1.0)]
    for name in ("bf16", "int8", "powersgd"):
        codec = build_codec(name, rank=2, group=None)
        sent = sum(codec.num_bytes(tensor, num_replicas=number) for tensor in tensors)
        rounds = 2.0 if name == "powersgd" else 1.0
        found.append((f"compressed codec={name}", all_reduce_bytes(sent, num_replicas=number), rounds))
    found += [(f"local_updates every={every}", whole / every, 1 / every) for every in (8, 32)]
    found.append((f"random_bases dimensions={_DIMENSIONS}", 4.0 * _DIMENSIONS * (number - 1), 0.5))
    found.append(("ensemble", 0.0, 0.0))
    return [(settings, _Need(num_bytes=sent, rounds=rounds)) for settings, sent, rounds in found]
