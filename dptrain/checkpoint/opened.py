"""One checkpoint folder, opened and verified; what this process has verified is remembered by file times."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load

from dptrain.checkpoint.manifest import MANIFEST, STATE, FileDigest, check_header, decode_manifest, decode_state, quoted
from dptrain.checkpoint.verified_files import check_file, manifest_bytes, opened_folder, verified_bytes
from dptrain.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from dptrain.checkpoint.manifest import JSON

_STEP_NAME = re.compile(r"step-([0-9]{12,})")

# What its reader, or ours of its header, says of other bytes.
_NOT_SAFETENSORS = (SafetensorError, CheckpointError, AssertionError, KeyError, RuntimeError, TypeError, ValueError)

# What this process found of each checkpoint, with the file times at which it found it: retention asks after every
# save, and must not hash gigabytes each time. Loading never relies on it.
verdicts: dict[Path, tuple[_Fingerprint, str | None]] = {}
_Fingerprint: TypeAlias = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint of which every byte was verified when it was opened.

    Attributes:
        path: its folder.
        step: optimizer steps done when it was written.
        state: what was given as `state`, floats equal bit for bit, tuples as tuples.
        passed_over: newer checkpoints that could not be trusted, newest first, each with the reason.
    """

    path: Path
    step: int
    state: dict[str, JSON]
    passed_over: tuple[tuple[Path, str], ...] = ()
    _digests: Mapping[str, FileDigest] = field(repr=False)

    @property
    def steps_lost(self) -> int:
        """Optimizer steps between this checkpoint and the newest that was passed over, going by its folder's name."""
        return max([step_of(path) for path, _ in self.passed_over], default=self.step) - self.step

    def holds(self, name: str) -> bool:
        """Return whether tensors were saved under a name."""
        return f"{name}.safetensors" in self._digests

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors saved under `name`, on the CPU.

        The file is read again and hashed again, so that the bytes parsed are the bytes verified even where somebody
        changed the file since. It costs about a second per GB once per restart, and twice the file's size in memory.

        Raises:
            CheckpointError: where there is no such file, or it is no longer what the manifest says.
        """
        file_name = f"{name}.safetensors"
        if file_name not in self._digests:
            raise CheckpointError(f"checkpoint {self.path} holds no {file_name}: it holds {', '.join(self._digests)}")
        try:
            with opened_folder(self.path) as folder:
                content = verified_bytes(folder, file_name, self._digests[file_name])
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f"checkpoint {self.path} has changed since it was verified: {error}") from error
        try:
            check_header(content, size_bytes=len(content))
            return dict(load(content))
        except _NOT_SAFETENSORS as error:
            raise CheckpointError(f"checkpoint {self.path}: {file_name} is not safetensors: {error!r}") from error


def committed(folder: Path) -> list[tuple[int, Path]]:
    """Every committed checkpoint as (step, path), newest first, intact or not."""
    if not folder.exists():
        return []
    found = [(step_of(path), path) for path in folder.iterdir() if _STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda item: item[0], reverse=True)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name."""
    return int(path.name.removeprefix("step-"))


def verdict(path: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None: hashed once by each process, then known by its file times."""
    try:
        times = fingerprint(path)
    except OSError as error:
        return str(error)
    known = verdicts.get(path)
    if known is None or known[0] != times:
        try:
            open_checkpoint(path)
            reason = None
        except CheckpointError as error:
            reason = str(error)
        verdicts[path] = known = (times, reason)
    return known[1]


def fingerprint(path: Path) -> _Fingerprint:
    """Return name, inode, size and times of each file of a checkpoint."""
    with os.scandir(path) as entries:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats))


def open_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint of which every byte was verified; a CheckpointError holds the bare reason."""
    try:
        with opened_folder(path) as folder:
            step, digests = decode_manifest(manifest_bytes(folder))
            _check_names(path, step=step, digests=digests, present=os.listdir(folder))  # noqa: PTH208 -- by descriptor, not by path
            for name, digest in digests.items():
                if name != STATE:
                    check_file(folder, name, digest)
            state = decode_state(verified_bytes(folder, STATE, digests[STATE]))
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error})") from error
    return Checkpoint(path=path, step=step, state=state, _digests=digests)


def _check_names(path: Path, *, step: int, digests: Mapping[str, FileDigest], present: Iterable[str]) -> None:
    promised_by_folder = _STEP_NAME.fullmatch(path.name)
    if promised_by_folder and int(promised_by_folder[1]) != step:
        raise CheckpointError(f"{MANIFEST} is of step {step}, which is not the step in the folder's name")
    found = set(present)
    missing = {*digests, STATE} - found
    extra = found - {*digests, MANIFEST}
    if missing:
        raise CheckpointError(f"{quoted(missing)} is missing")
    if extra:
        raise CheckpointError(f"{quoted(extra)} is not in {MANIFEST}")
