"""What a run has used up to now, earlier attempts included: FLOPs, time of devices, energy, money; measures nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dptrain.errors import CheckpointError
from dptrain.tracking.jsonl import Value

PETAFLOP_S_DAY = 1e15 * 86_400
"""FLOPs in a petaflop/s-day."""
_HOUR_S = 3600


@dataclass(frozen=True, kw_only=True)
class Used:
    """What was used, all replicas together. Exactly this is in a checkpoint.

    A figure of which any part was not known is None from then on: a sum with a hole in it would be too small.

    Attributes:
        flops: of forward and backward passes, as `FlopCounter` counts them.
        steps_device_s: seconds × devices in optimizer steps.
        pauses_device_s: the same in evaluations and saves.
        peak_flops: what the devices could have done at their peak in `steps_device_s`.
        energy_j: drawn by the devices, without their hosts.
        bytes_sent: by one replica, in what replicas exchange, as the exchange computes it.
        cost: in the currency of the price.
    """

    flops: float | None = 0.0
    steps_device_s: float = 0.0
    pauses_device_s: float = 0.0
    peak_flops: float | None = 0.0
    energy_j: float | None = 0.0
    bytes_sent: float | None = 0.0
    cost: float | None = 0.0


class Ledger:
    """Adds up what a run uses. Every number is handed in, so nothing here waits for a device.

    Args:
        world_size: number of replicas, each on one device.
        peak_flops_per_s: of one device, from `peak_flops_per_s`; None where it is not known.
        price_per_device_hour: in any currency; None for no cost.
        density: part of the FLOPs that is not a product with a zero of a sparse weight, from `flop_density`; None for
            a dense model.
    """

    def __init__(
        self,
        *,
        world_size: int,
        peak_flops_per_s: float | None = None,
        price_per_device_hour: float | None = None,
        density: float | None = None,
    ) -> None:
        self._world_size = world_size
        self._peak_flops_per_s = peak_flops_per_s
        self._price_per_device_s = None if price_per_device_hour is None else price_per_device_hour / _HOUR_S
        self._density = density
        self._used = Used()

    def step(
        self,
        *,
        seconds: float,
        num_samples: int,
        flops_per_sample: float | None,
        energy_j: float,
        bytes_sent: float | None = None,
    ) -> None:
        """Enter one optimizer step.

        Args:
            seconds: that it took.
            num_samples: global batch.
            flops_per_sample: from `FlopCounter.take_per_sample`.
            energy_j: drawn by all devices since the last entry; NaN where it is not known.
            bytes_sent: by one replica; None where it is not known.
        """
        device_s = seconds * self._world_size
        used = self._used
        self._used = Used(
            flops=_sum(used.flops, _product(flops_per_sample, num_samples)),
            steps_device_s=used.steps_device_s + device_s,
            pauses_device_s=used.pauses_device_s,
            bytes_sent=_sum(used.bytes_sent, bytes_sent),
            peak_flops=_sum(used.peak_flops, _product(self._peak_flops_per_s, device_s)),
            energy_j=_sum(used.energy_j, _known(energy_j)),
            cost=_sum(used.cost, _product(self._price_per_device_s, device_s)),
        )

    def pause(self, *, seconds: float, energy_j: float) -> None:
        """Enter an evaluation or a save, for which the devices are paid for too."""
        device_s = seconds * self._world_size
        self._used = replace(
            self._used,
            pauses_device_s=self._used.pauses_device_s + device_s,
            energy_j=_sum(self._used.energy_j, _known(energy_j)),
            cost=_sum(self._used.cost, _product(self._price_per_device_s, device_s)),
        )

    @property
    def device_s(self) -> float:
        """Seconds × devices, steps and pauses."""
        return self._used.steps_device_s + self._used.pauses_device_s

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the FLOPs over what the devices could have done in the steps (arXiv 2204.02311)."""
        used = self._used
        return used.flops / used.peak_flops if used.flops is not None and used.peak_flops else None

    def columns(self) -> dict[str, Value]:
        """Return the columns of a row of the log, cumulative; null where a figure is not known."""
        used = self._used
        return {
            "ledger/flops": used.flops,
            **({} if self._density is None else {"ledger/sparse_flops": _product(used.flops, self._density)}),
            "ledger/device_s": self.device_s,
            "ledger/mfu": self.mfu,
            "ledger/energy_j": used.energy_j,
            "ledger/bytes_sent": used.bytes_sent,
            "ledger/cost": used.cost,
        }

    def figures(self) -> dict[str, Value]:
        """Return the figures of the summary: the columns by their bare names, petaflop/s-days, the peak of a device."""
        flops = self._used.flops
        return {
            **{name.removeprefix("ledger/"): value for name, value in self.columns().items()},
            "petaflop_s_days": None if flops is None else flops / PETAFLOP_S_DAY,
            "peak_flops_per_s": self._peak_flops_per_s,
        }

    def state(self) -> dict[str, float | None]:
        """Return what a checkpoint must hold."""
        return asdict(self._used)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`, whatever devices and price were then.

        Raises:
            CheckpointError: where it is not one.
        """
        try:
            # Of a run of an earlier version nobody knows.
            self._used = Used(**{"bytes_sent": None, **state})
        except TypeError as error:
            raise CheckpointError(f"not the state of a ledger: {error}") from error


def _known(energy_j: float) -> float | None:
    return None if math.isnan(energy_j) else energy_j


def _sum(before: float | None, part: float | None) -> float | None:
    return None if before is None or part is None else before + part


def _product(unit: float | None, number: float) -> float | None:
    return None if unit is None else unit * number
