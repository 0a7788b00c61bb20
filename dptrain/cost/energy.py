"""The energy that one GPU draws, from the counter in its driver; a device without one has no figure."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

_EVERY_S = 1.0
"""The driver may take a millisecond to answer, and the counter itself moves only every 20 to 100 ms."""


class EnergyCounter:
    """Reads the joules that a GPU has drawn since the last reading.

    NVML counts the whole board, from Volta on, also what other programs on it draw. Where there is no such counter
    (a CPU, an older GPU, a slice of one, no driver library) every reading is NaN, and so is each sum it goes into:
    one replica without a counter, and the run's energy is not known.

    Args:
        device: of this replica.
        clock: seconds; for tests.
    """

    def __init__(self, device: torch.device, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._read_mj = _counter(device)
        self._clock = clock
        self._last_mj = self._now_mj()
        self._last_s = clock()

    def take_j(self, *, at_once: bool = False) -> float:
        """Return the joules since the last reading; 0 where that is less than a second ago.

        Args:
            at_once: read in any case, at the end of a run. No host sync either way.
        """
        if math.isnan(self._last_mj):
            return math.nan
        now_s = self._clock()
        if not at_once and now_s - self._last_s < _EVERY_S:
            return 0.0
        before, self._last_mj, self._last_s = self._last_mj, self._now_mj(), now_s
        return (self._last_mj - before) / 1000

    def _now_mj(self) -> float:
        return math.nan if self._read_mj is None else self._read_mj()


def _counter(device: torch.device) -> Callable[[], float] | None:
    if device.type != "cuda":
        return None
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        # By its identity: CUDA_VISIBLE_DEVICES renumbers CUDA's devices, and not NVML's.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # noqa: BLE001 - whatever a driver says: a run does not need its energy to be known
        return None
    return lambda: _millijoules(pynvml, handle)


def _millijoules(nvml: Any, handle: object) -> float:  # noqa: ANN401 - a module without types
    try:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except nvml.NVMLError:  # a driver that was unloaded under the run
        return math.nan
