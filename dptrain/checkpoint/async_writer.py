"""Saving while training goes on: a copy between two steps, and one thread that hands it to `save_checkpoint`."""

from __future__ import annotations

import copy
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dptrain.checkpoint.finite import StateNotFiniteError, check_finite
from dptrain.checkpoint.host_copy import HostCopy
from dptrain.checkpoint.permissions import warn_if_exposed
from dptrain.checkpoint.shards import Staging, announce_failure, write_shard
from dptrain.checkpoint.store import prepare_folder, save_checkpoint
from dptrain.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from torch import Tensor

    from dptrain.checkpoint.manifest import JSON


@dataclass(frozen=True, kw_only=True)
class SaveStatus:
    """What has become of the saves so far; the other replicas learn it from here."""

    committed_step: int
    """Step of the last checkpoint that was committed, or that the run began from; 0 for a run that began anew."""
    failed: int = 0
    """Saves that have failed since one was committed."""
    skipped: int = 0
    """Saves not begun because one was under way, in all."""
    error: str | None = None
    """Why the last one failed; None where it did not."""
    is_diverged: bool = False
    """Whether that is because the state holds numbers that are not finite: no fault of the disk."""
    stall_s: float = 0.0
    """How long the last copy held up training."""
    write_s: float = 0.0
    """How long the last write took that was committed."""


class AsyncWriter:
    """Writes checkpoints in a thread of its own: on rank 0, and where they are sharded on all ranks.

    The thread runs no collective; shards meet in the folder.

    Nothing that happens to a save is raised, since an exception on one replica would leave the others in their next
    collective: it is in `status`, and the caller decides, on all replicas alike. A process that ends while a write is
    under way, by an exception too, waits for it first; one that is killed leaves the checkpoints before it.

    Args:
        folder: for the checkpoints; made if it is missing.
        keep: how many verified checkpoints to leave.
        committed_step: the step that the run begins from.
        infinite: entries (`model/mask`) that hold infinities on purpose; `infinite_buffers` finds them.
        commits: whether this is rank 0; the others write their shards of sharded checkpoints.

    Raises:
        CheckpointError: where nothing can be written to `folder`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        committed_step: int = 0,
        infinite: Collection[str] = (),
        commits: bool = True,
    ) -> None:
        if commits:
            prepare_folder(folder)
            warn_if_exposed(folder)
        self._folder = folder
        self._keep = keep
        self._infinite = frozenset(infinite)
        self._snapshot = HostCopy()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dptrain-async-writer")
        self._writing: Future[tuple[int, float]] | None = None
        self._staging: Staging | None = None
        self._status = SaveStatus(committed_step=committed_step)

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        staging: Staging | None = None,
    ) -> bool:
        """Copy everything, have it written, and return; training may change the tensors from then on.

        A save that meets another under way is skipped: `wait` first where it must not be. The arguments are those of
        `save_checkpoint`. The first copy also makes the buffers, and so takes longer.

        Returns:
            Whether the write has begun.
        """
        if self._under_way():
            self._status = replace(self._status, skipped=self._status.skipped + 1)
            return False
        began = time.perf_counter()
        try:
            copied = self._snapshot.take(tensors)
            copied_state = copy.deepcopy(dict(state))
        except Exception as error:  # noqa: BLE001 - no memory, say; see the class: nothing is raised on one replica alone
            self._status = _after_failure(self._status, error)
            _announce(staging, error)
            return False
        self._status = replace(self._status, stall_s=time.perf_counter() - began)
        self._staging = staging
        self._writing = self._executor.submit(
            self._write, step=step, tensors=copied, state=copied_state, staging=staging
        )
        return True

    def status(self) -> SaveStatus:
        """Say what is known now; never waits."""
        self._under_way()
        return self._status

    def wait(self, *, timeout_s: float | None = None) -> bool:
        """Wait for the write under way.

        Returns:
            Whether none is under way any more.
        """
        if self._writing is not None:
            wait([self._writing], timeout=timeout_s)
        return not self._under_way()

    def close(self) -> None:
        """Wait for the write under way, for as long as it takes, and end the thread. Calling it again does nothing."""
        if self._staging is not None:
            self._staging.closing.set()
        self._executor.shutdown(wait=True)
        self._under_way()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _under_way(self) -> bool:
        """Whether a write is under way; takes in the outcome of one that has ended."""
        if self._writing is None or not self._writing.done():
            return self._writing is not None
        error = self._writing.exception()
        if error is None:
            committed_step, write_s = self._writing.result()
            self._status = replace(self._status, committed_step=committed_step, failed=0, error=None, write_s=write_s)
        else:
            self._status = _after_failure(self._status, error)
        self._writing = None
        return False

    def _write(
        self,
        *,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, JSON],
        staging: Staging | None,
    ) -> tuple[int, float]:
        """Run in the thread, on the copies alone."""
        began = time.perf_counter()
        try:
            check_finite(tensors, infinite=self._infinite)
            _check_run_folder(self._folder.parent, step=step)
            if staging is not None and staging.rank != 0:
                write_shard(staging, tensors)
            else:
                save_checkpoint(self._folder, step=step, tensors=tensors, state=state, keep=self._keep, staging=staging)
        except Exception as error:
            _announce(staging, error)
            raise
        return step, time.perf_counter() - began


def _check_run_folder(folder: Path, *, step: int) -> None:
    """Raise where it is gone: made anew, it would hold a checkpoint and nothing else of the run."""
    if not folder.exists():
        raise CheckpointError(f"the checkpoint of step {step:,} could not be written: {folder} was deleted or moved")


def _announce(staging: Staging | None, error: BaseException) -> None:
    """Let rank 0 know that a shard will not come; rank 0 itself knows."""
    if staging is not None and staging.rank != 0:
        with suppress(OSError):
            announce_failure(staging, error)


def _after_failure(status: SaveStatus, error: BaseException) -> SaveStatus:
    sentence = str(error) if isinstance(error, CheckpointError) else f"saving failed: {type(error).__name__}: {error}"
    return replace(status, failed=status.failed + 1, error=sentence, is_diverged=isinstance(error, StateNotFiniteError))
