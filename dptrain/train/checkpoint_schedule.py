"""When a run is saved, and that it was: decides, hands over to the writer, and says what came of it."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dptrain.checkpoint.async_writer import AsyncWriter
from dptrain.checkpoint.interval import young_daly_s
from dptrain.checkpoint.settings import CheckpointConfig
from dptrain.checkpoint.shards import Staging, pieces_of
from dptrain.errors import CheckpointError, DivergedError
from dptrain.runtime.step_reduction import StepRecord, on_rank_0, wait_together
from dptrain.tracking.run_folder import was_removed
from dptrain.tracking.run_log import RunLog

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dptrain.checkpoint.manifest import JSON

    Packed = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, JSON]]

_FIRST_S = 5.0
"""The first checkpoint by the clock comes after this; it measures the cost of one."""
_WORTH_TELLING = 2.0
_LOOK_S = 1.0
"""Between two looks whether the run folder is still there: three stats, 10 µs on a disk and 1 ms over a network."""


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """Who saves where parameters are sharded.

    Attributes:
        rank: of this process.
        num_ranks: that save a shard each.
        agree: returns rank 0's whole numbers on all ranks; a collective.
        patience_s: how long rank 0 waits for the shards of the others.
    """

    rank: int
    num_ranks: int
    agree: Callable[[Sequence[int]], list[int]]
    patience_s: float


class CheckpointManager:
    """Saves the state of a run: on rank 0, for the replicas are equal; on all ranks where parameters are sharded.

    Args:
        config: how often, and how many are kept.
        folder: of the checkpoints.
        pack: returns step, tensors and state of this moment, which may share memory with the live objects.
        infinite: entries that hold infinities on purpose, see `AsyncWriter`.
        committed_step: of the checkpoint that the run goes on from, 0 for none.
        log: gets failures and changes of the interval.
        sharding: where parameters are sharded. Then all ranks call `save` together.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        *,
        folder: Path,
        pack: Callable[[], tuple[int, Packed]],
        infinite: frozenset[str],
        committed_step: int,
        log: RunLog,
        sharding: Sharding | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._sharding = sharding
        self._rank = 0 if sharding is None else sharding.rank
        self._pack = pack
        self._log = log
        self._writer = AsyncWriter(
            folder, keep=config.keep, committed_step=committed_step, infinite=infinite, commits=self._rank == 0
        )
        self._interval_s = _FIRST_S
        self._logged_s: float | None = None
        self._failed = 0
        self._last: int | None = None
        self._saved_s = time.monotonic()
        self._looked_s = -math.inf
        self._has_been_there = False

    def is_due(self) -> bool:
        """Whether a save is due by rank 0's clock, never where saves are by samples. Asked for, it is not due again."""
        if self._rank != 0:
            return False
        now_s = time.monotonic()
        if self._config.every_samples is not None or now_s - self._saved_s < self._interval_s:
            return False
        self._saved_s = now_s
        return True

    def save(self) -> None:
        """Copy the state and have it written while training goes on.

        Where a save is still under way, this one is left out: `wait` first where it must not be.
        """
        began_s = time.monotonic()
        self._begin()
        self._saved_s = time.monotonic()
        self._choose_interval(stall_s=self._saved_s - began_s)

    def wait(self, timeout_s: float, *, for_last: bool) -> bool:
        """Wait for the save under way, where the next one does; return whether that can begin."""
        if for_last or self._config.every_samples is not None or self._rank != 0:
            return self._writer.wait(timeout_s=timeout_s)
        return True

    def begin_last(self) -> None:
        """Copy the state of this moment and have it written, once `wait` says that it can be."""
        self._last = self._begin()

    def check_last(self) -> None:
        """Say what came of it, once it is written.

        Raises:
            CheckpointError: where it could not be written.
            DivergedError: where it holds numbers that are not finite.
        """
        status = self._writer.status()
        if status.committed_step != self._last:
            # The last steps of a run can be too few for the trainer to call it diverged; no disk is to blame for them.
            if status.is_diverged:
                raise DivergedError(str(status.error))
            raise CheckpointError(status.error or f"the checkpoint of step {self._last} was not written")

    def _begin(self) -> int | None:
        """Copy the state and have it written; return the step, or None where a write is under way."""
        if self._sharding is None:
            step, (tensors, state) = self._pack()
            self._writer.save(step=step, tensors=tensors, state=state)
            return step
        # Rank 0 alone knows whether its write is under way; its number marks the folder of this one save.
        free = self._writer.wait(timeout_s=0)
        (number,) = self._sharding.agree([1 + secrets.randbits(31) if free else 0] if self._rank == 0 else [])
        if not number:
            return None
        step, (tensors, state) = self._pack()
        whole, pieces, layout = pieces_of(tensors, rank=self._rank)
        staging = Staging(
            folder=self._folder / f".tmp-{step}-{number:08x}",
            rank=self._rank,
            num_ranks=self._sharding.num_ranks,
            layout=layout,
            patience_s=self._sharding.patience_s,
        )
        self._writer.save(
            step=step, tensors=pieces if self._rank else {**whole, **pieces}, state=state, staging=staging
        )
        return step

    def failed_saves(self) -> int:
        """Return how many saves in a row failed, on rank 0, which hears of the others' shards; tells of each once."""
        if self._rank != 0:
            return 0
        status = self._writer.status()
        if status.failed > self._failed:
            self._log.note(f"{status.error}; training goes on")
        self._failed = status.failed
        return status.failed

    def folder_removed(self) -> bool:
        """Say whether the run folder was there and is gone, on rank 0, which looks once in a second."""
        now_s = time.monotonic()
        if self._rank != 0 or now_s - self._looked_s < _LOOK_S:
            return False
        self._looked_s = now_s
        is_there = not was_removed(self._folder.parent)
        self._has_been_there = self._has_been_there or is_there
        return self._has_been_there and not is_there

    def close(self) -> None:
        """Wait for the save under way."""
        self._writer.close()

    def _choose_interval(self, *, stall_s: float) -> None:
        self._interval_s = young_daly_s(
            stall_s=stall_s,
            write_s=self._writer.status().write_s,
            mean_time_between_failures_s=3600 * self._config.hours_between_failures,
        )
        logged_s = self._logged_s
        if self._config.every_samples is None and (
            logged_s is None or not 1 / _WORTH_TELLING < self._interval_s / logged_s < _WORTH_TELLING
        ):
            self._logged_s = self._interval_s
            self._log.note(
                f"checkpoint interval: {self._interval_s:.0f} s (stall {1e3 * stall_s:.2g} ms, assumed MTBF "
                f"{self._config.hours_between_failures:g} h)"
            )


def save_on_all(
    manager: CheckpointManager | None,
    *,
    is_last: bool,
    join: Callable[[], object] | None,
    rank: int,
    device: torch.device,
    beat: Callable[[], None],
) -> None:
    """Save on all replicas. A collective; the last save of a run is written when it returns.

    Replicas wait for a write in turns of a few seconds each, so that it may take longer than one collective.

    Args:
        manager: on replicas that write something.
        is_last: whether the run ends.
        join: what a replica that writes nothing does while the state is packed, where that takes all of them.
        rank: of this replica.
        device: where the collectives run.
        beat: for the watchdog.

    Raises:
        CheckpointError: where the last save cannot be written.
        DivergedError: where the last save holds numbers that are not finite.
    """

    def wait(timeout_s: float) -> bool:
        return manager is None or manager.wait(timeout_s, for_last=is_last)

    wait_together(wait, device=device, beat=beat)
    if manager is None and join is not None:
        join()
    if not is_last:
        if manager is not None:
            manager.save()
        return
    if manager is not None and rank != 0:
        manager.begin_last()  # its shard, for which rank 0 waits
    on_rank_0(lambda: None if manager is None else manager.begin_last(), rank=rank, device=device)
    wait_together(wait, device=device, beat=beat)
    on_rank_0(lambda: None if manager is None else manager.check_last(), rank=rank, device=device)


def crosses(record: StepRecord, every_samples: int | None) -> bool:
    """Whether the step ended at or beyond the next multiple of `every_samples`; never where there is no such number."""
    return every_samples is not None and record.end // every_samples > record.position // every_samples
