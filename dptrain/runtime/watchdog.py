"""The watchdog of one replica: no sign of life for too long, and it tells where every thread stands and ends it."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import Self

from dptrain.runtime.rendezvous import collective_timeout_s
from dptrain.runtime.signals import EXIT_HUNG, place_of_replica

_PATIENCE_ALONE_S = 1800.0
"""Nobody waits for a replica that is alone, and some first steps compile for long."""
_PATIENCE_FIRST_S = 7200.0
"""For the first step: it may compile, but a loader that hangs in it is not waited for without end."""
_BEYOND_COLLECTIVE = 1.25
"""Patience to the timeout of a collective. With both equal the replica that waits was ended by its own watchdog, and
blamed, before its collective could say that another one did not answer; 1.25 named the right one in every trial."""
_LOCK_HELD_S = 1.0
_EASE_S = 0.5


class Watchdog:
    """Ends the process, with the stacks of all threads on stderr under its rank, unless `beat` is called in time.

    A thread ends it with exit code 71. Where code holds the interpreter lock, so that no thread of Python runs, a timer
    of the C library does a second later, with exit code 1 and without a heading. That begins with the first beat; what
    comes before, such as a first compilation, may take two hours.

    Args:
        world_size: number of replicas.
        patience_s: longest time between two beats. Default: a quarter longer than a collective waits for a peer, so
            that a replica that waits learns from its collective who does not answer; half an hour for one alone.
    """

    def __init__(self, *, world_size: int, patience_s: float | None = None) -> None:
        default_s = _BEYOND_COLLECTIVE * collective_timeout_s() if world_size > 1 else _PATIENCE_ALONE_S
        self._patience_s = default_s if patience_s is None else patience_s
        self._limit_s = max(_PATIENCE_FIRST_S, self._patience_s)
        self._armed_s = 0.0
        self._beat_s = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Say that all is well."""
        now_s = self._beat_s = time.monotonic()
        self._limit_s = self._patience_s
        if self._thread is None:
            self._start()
        # Arming the timer starts a thread of C, which is too slow for each of many short steps.
        if now_s - self._armed_s > min(_EASE_S, self._patience_s / 10):
            self._armed_s = now_s
            later_s = self._patience_s + _LOCK_HELD_S
            faulthandler.dump_traceback_later(later_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(max(0.01, min(self._beat_s + self._limit_s - time.monotonic(), self._patience_s))):
            if time.monotonic() - self._beat_s < self._limit_s:
                continue
            stream = sys.__stderr__ or sys.stderr
            stream.write(f"dptrain: {place_of_replica()} made no step for {self._limit_s:g} s; it stands here:\n")
            stream.flush()
            faulthandler.dump_traceback(file=stream, all_threads=True)
            os._exit(EXIT_HUNG)

    def __enter__(self) -> Self:
        self._beat_s = time.monotonic()
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
