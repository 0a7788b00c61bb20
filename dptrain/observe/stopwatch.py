"""How long measuring takes, timed by the meter itself; what follows from it is decided in `pace`."""

from __future__ import annotations

import time
from collections import deque

import torch

_DISPATCH_S = 4e-6
"""What torch takes to call a Python hook in the midst of a backward pass, which the hook itself cannot time."""


class Stopwatch:
    """Adds up the seconds between `start` and `stop`.

    On a CPU, where kernels run inside the call, by the host's clock. On CUDA by a pair of events in the stream, read
    only once the device has passed them: nothing waits, and the seconds come late.

    Args:
        device: where the timed work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> float | torch.cuda.Event:
        """Return what `stop` needs."""
        return self._event() if self._on_device else time.perf_counter()

    def stop(self, began: float | torch.cuda.Event) -> None:
        """Add the time since `began`."""
        if isinstance(began, float):
            self._seconds += time.perf_counter() - began + _DISPATCH_S
        else:
            self._pairs.append((began, self._event()))

    def take(self) -> float:
        """Return the seconds added up since the last call; device work that is not done yet counts next time."""
        while self._pairs and self._pairs[0][1].query():  # type: ignore[no-untyped-call]
            first, last = self._pairs.popleft()
            self._seconds += first.elapsed_time(last) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
