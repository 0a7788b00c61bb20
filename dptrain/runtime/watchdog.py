"""The watchdog of one replica: no sign of life for too long, and it tells where every thread stands and ends it."""

from __future__ import annotations

import faulthandler
import sys
import time
from typing import Self

from dptrain.runtime.rendezvous import collective_timeout_s

_PATIENCE_ALONE_S = 1800.0
"""Nobody waits for a replica that is alone, and some first steps compile for long."""
_EASE_S = 0.5


class Watchdog:
    """Ends the process, with exit code 1 and the stacks of all threads on stderr, unless `beat` is called in time.

    It is a thread of the C library that needs no interpreter lock, so that it also sees code that holds the lock. It
    begins with the first beat: what comes before, such as a first compilation, may take its time.

    Args:
        world_size: number of replicas.
        patience_s: longest time between two beats. Default: as long as a collective waits for a peer, for by then a
            replica that hangs has brought down the others anyway; half an hour for a replica that is alone.
    """

    def __init__(self, *, world_size: int, patience_s: float | None = None) -> None:
        default_s = collective_timeout_s() if world_size > 1 else _PATIENCE_ALONE_S
        self._patience_s = default_s if patience_s is None else patience_s
        self._armed_s = 0.0

    def beat(self) -> None:
        """Say that all is well."""
        now_s = time.monotonic()
        # Arming starts a thread, which costs too much for each of many short steps.
        if now_s - self._armed_s > min(_EASE_S, self._patience_s / 10):
            self._armed_s = now_s
            faulthandler.dump_traceback_later(self._patience_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
