"""Whether all ranks close their first measured step: one that does so alone would wait in a collective for ever."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from typing import Any

import torch.distributed as dist

from dptrain.errors import ObservationError

PATIENCE_S = 30.0
"""Wait for the others at the first step, before the error or the warning. DDP has just brought the ranks together, but
on a GPU their hosts may still compile the backward pass, and one rank may repeat a micro-batch."""
_LONGEST_PAUSE_S = 0.5
_MOST_DISCARDS = 3
"""Posts of gradients that were thrown away, so that a loop that closes no step costs nothing in the long run."""

_num_made: Counter[tuple[int, int]] = Counter()
"""Checks made by this process for each group, known by its first rank and size: the same on all ranks of a group."""


class FirstStepCheck:
    """Has the ranks meet at the process group's store before the first reduction, and never again.

    A rank that throws its gradients away, and so begins anew, posts it until its first step is closed. Ranks in DDP do
    that together: where one waits at its first step and another has gone on, the other will not come.

    Args:
        group: over which is reduced.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._ranks = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        # A rank outside of the group has a size of -1, and torch's fake group, of a dry run, has no store that counts.
        self._done = self._ranks <= 1 or dist.get_backend(group) == "fake"
        self._num_discards = 0
        if not self._done:
            key = dist.get_global_rank(group, 0) if group is not None else 0, self._ranks
            _num_made[key] += 1
            self._prefix = f"dptrain/meter/{key[0]}/{key[1]}/{_num_made[key]}"

    def discarded(self) -> None:
        """Note that this rank has thrown away the gradients of its first step; nothing once a step is closed."""
        if not self._done and self._num_discards < _MOST_DISCARDS:
            self._num_discards += 1
            self._add("discards", 1)

    def meet(self) -> None:
        """Wait, once, for the other ranks to close their first step as well.

        Raises:
            ObservationError: where another rank has gone on without closing it.
        """
        if self._done:
            return
        self._done = True
        arrived, pause, deadline = self._add("closed", 1), 1e-3, time.monotonic() + PATIENCE_S
        while arrived < self._ranks:
            if time.monotonic() > deadline:
                self._complain(arrived)
                return  # the reduction waits from here on, and ends in the timeout of the process group
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            arrived = self._add("closed", 0)

    def _complain(self, arrived: int) -> None:
        """Raise where a rank is known to have gone on, else warn: a host may only be slow."""
        found = f"{arrived} of {self._ranks} ranks have closed their first measured step"
        remedy = "attach the meter and call meter.step() on all ranks, not under `if rank == 0`: it is a collective"
        # Ranks that are together have thrown away as often as this one, or not yet.
        together = self._num_discards * self._ranks
        if self._num_discards < _MOST_DISCARDS and self._add("discards", 0) > together:
            raise ObservationError(f"{found}, and another rank went on without it: {remedy}")
        warnings.warn(f"noise scale: {found}, and wait for the others: {remedy}", stacklevel=2)

    def _add(self, name: str, amount: int) -> int:
        store: Any = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - torch has no public way to it
        return int(store.add(f"{self._prefix}/{name}", amount))
