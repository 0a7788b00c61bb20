"""Python's cyclic garbage collection, moved out of the training step to where no replica waits for another."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class GarbageCollection:
    """Collects once in so many steps, at the same step on all replicas.

    Left to itself, the collector runs in the midst of a step, on each replica in another one, and all wait for each:
    a full collection takes 40 to 150 ms with torch loaded.

    Args:
        every_steps: steps between two collections; 0 leaves Python's own in charge.
    """

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep Python from collecting by itself inside."""
        if not self._every_steps or not gc.isenabled():
            yield
            return
        # What was loaded up to here lives as long as the process: no collection needs to walk through it again.
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.unfreeze()

    def stepped(self, step: int) -> None:
        """Collect after a step where it is due."""
        if self._every_steps and step % self._every_steps == 0:
            gc.collect(1)
