"""The files of a checkpoint: how one is committed, verified, found again and retired; nothing of models lives here.

A checkpoint is a folder `step-000000000042` with one safetensors file per group of tensors, `state.json`, and
`manifest.json`, which names every file with its size and sha256 and carries the sha256 of itself. It is written under
a temporary name and renamed when it is safe on disk, so a reader sees all of it or nothing. The checksums find damage,
not malice: nothing here is signed. But nothing here is code either, so a planted checkpoint cannot run any.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import threading
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dptrain.checkpoint.durable_files import fsync_folder, sync_and_digest
from dptrain.checkpoint.manifest import (
    MANIFEST,
    MAX_TENSORS,
    PLAIN_NAME,
    STATE,
    FileDigest,
    check_header,
    encode_manifest,
    encode_state,
)
from dptrain.checkpoint.opened import Checkpoint, committed, fingerprint, open_checkpoint, verdict, verdicts
from dptrain.checkpoint.shards import Staging, announce, collect_shards, own_files
from dptrain.checkpoint.verified_files import check_limit
from dptrain.errors import CheckpointError, ConfigError
from dptrain.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from dptrain.checkpoint.manifest import JSON

_STEP_NAME = re.compile(r"step-([0-9]{12,})")
_BAD_NAME = re.compile(r"\.bad-([0-9]{12,})-[0-9a-f]+")

# What safetensors reads back under torch; it writes a few more (float8_e8m0fnu, say) that it then cannot load.
_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint64, torch.uint32, torch.uint16, torch.uint8}
    | {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)

# A second save of this process waits for the first, so that no save takes the other's folder for a leftover.
_one_writer = threading.Lock()


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    keep: int = 3,
    staging: Staging | None = None,
) -> Path:
    """Commit one checkpoint to disk, then retire the oldest beyond `keep`.

    When it returns, the checkpoint survives a kill of the process (and a loss of power, where the disk honours fsync).
    When it raises, earlier checkpoints are as they were. An intact checkpoint of the same step is kept as it is; a
    damaged one is renamed to `.bad-…` and replaced. Retention counts only verified checkpoints, and only those up to
    `step`: it never removes the one just written. Only one process may save into a folder; the caller sees to that.

    Args:
        folder: holds the checkpoints; made (mode 0700) if it is missing.
        step: optimizer steps done, at least 0.
        tensors: file stem (`model`, `optimizer`) → key → tensor: contiguous, sharing no memory within one file. They
            must not change before this returns: copy them first if training goes on meanwhile.
        state: everything else. Strict JSON, plus tuples and non-finite floats.
        keep: how many verified checkpoints to leave, this one included, at least 1.
        staging: where all ranks write a shard each, for a sharded checkpoint; this call waits for theirs.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: where it cannot be written (disk full, say), or holds what a file cannot.
        ConfigError: where `keep` is below 1.
    """
    if staging is not None:
        assert staging.folder.parent == folder, staging.folder
    if keep < 1:
        raise ConfigError(f"keep must be at least 1, got {keep}: retention never removes the last checkpoint")
    assert step >= 0, step
    assert all(PLAIN_NAME.fullmatch(f"{name}.safetensors") for name in tensors), list(tensors)
    final = folder / f"step-{step:012d}"
    encoded = encode_state(state)
    for name, group in tensors.items():
        _check_tensors(name, group)
    with _one_writer:
        try:
            _make_folder(folder)
            _remove_leftovers(folder, but=None if staging is None else staging.folder)
            with suppress(OSError):
                # A writer that died before it could prune left one too many; this save is to need room for one only.
                _prune(folder, step=step, keep=keep)
            if not os.path.lexists(final) or verdict(final) is not None:
                _commit(final, step=step, tensors=tensors, encoded_state=encoded, staging=staging)
            else:
                fsync_folder(folder)  # its writer may have died between rename and fsync
                if staging is not None:
                    _delete(staging.folder)
        except (OSError, SafetensorError) as error:
            needed = len(encoded) + sum(t.nbytes for group in tensors.values() for t in group.values())
            raise CheckpointError(
                f"checkpoint {final} could not be written: {error}; it needs about {needed} bytes and "
                f"{_free_bytes(folder)} are free there; earlier checkpoints are untouched: make room, or make the "
                f"folder writable"
            ) from error
        try:
            verdicts[final] = (fingerprint(final), None)
            _prune(folder, step=step, keep=keep)
        except OSError as error:
            warnings.warn(
                f"checkpoint {final} is saved, but older ones in {folder} could not be removed: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return final


def prepare_folder(folder: Path) -> None:
    """Make the folder of checkpoints where it is missing, and write a byte to it: before training, not hours later.

    Raises:
        CheckpointError: where nothing can be saved there.
    """
    try:
        _make_folder(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", buffering=0) as probe:
            probe.write(b"x")
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint can be written to {folder}: {error}; choose a folder that is yours and has room"
        ) from error


def load_newest(folder: Path, *, allow_fresh: bool = False) -> Checkpoint | None:
    """Return the newest checkpoint (by step) that is intact, or None where there is none at all.

    Args:
        folder: holds the checkpoints.
        allow_fresh: return None also where there are checkpoints and none is intact, because the user has said that
            the run may begin anew then. `set_aside` moves them out of its way.

    Raises:
        CheckpointError: where there are checkpoints and none is intact (the text gives each one's reason), or the
            folder cannot be read. A run must not start afresh silently then.
    """
    try:
        candidates = committed(folder)
    except OSError as error:
        raise CheckpointError(f"the checkpoint folder {folder} cannot be read: {error}") from error
    passed_over: list[tuple[Path, str]] = []
    for _, path in candidates:
        try:
            return replace(open_checkpoint(path), passed_over=tuple(passed_over))
        except CheckpointError as error:
            passed_over.append((path, str(error)))
    if not passed_over or allow_fresh:
        return None
    reasons = "; ".join(f"{path.name}: {reason}" for path, reason in passed_over)
    raise CheckpointError(
        f"no checkpoint in {folder} can be trusted, so there is none to resume from, unless "
        f"--allow-fresh starts the run over ({reasons})"
    )


def set_aside(folder: Path) -> list[Path]:
    """Rename every checkpoint that cannot be trusted to `.bad-…`, so that no later resume meets it.

    For the one process that saves into the folder. They are kept as evidence until retention has passed their step.

    Returns:
        The new names.

    Raises:
        CheckpointError: where one cannot be renamed.
    """
    try:
        return [_rename_bad(path, step=step) for step, path in committed(folder) if verdict(path) is not None]
    except OSError as error:
        raise CheckpointError(f"a damaged checkpoint in {folder} cannot be set aside: {error}") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder `path`, whatever that folder is called.

    Raises:
        CheckpointError: where it is not intact; the text gives the reason.
    """
    try:
        return open_checkpoint(path)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} cannot be trusted: {error}") from error


# --- writing ---------------------------------------------------------------------------------------------------------


def _commit(
    final: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    encoded_state: bytes,
    staging: Staging | None,
) -> None:
    temporary = final.with_name(f".tmp-{step}-{secrets.token_hex(4)}") if staging is None else staging.folder
    try:
        temporary.mkdir(mode=0o700, exist_ok=staging is not None)
        temporary.chmod(0o700)  # a umask may have taken our own rights away
        digests = {}
        for name, group in tensors.items():
            path = temporary / f"{name}.safetensors"
            # Not `save` to bytes, which would keep hash and file in one hand: it takes twice the memory, and holds
            # the interpreter lock throughout, so that a save in a thread would stop the training loop.
            save_file(dict(group), path)
            with path.open("rb") as file:
                check_header(file.read(8), size_bytes=path.stat().st_size)
            digests[path.name] = sync_and_digest(path)
        if staging is not None:
            announce(staging, {name: digests.pop(name) for name in own_files(staging) if name in digests})
            digests |= collect_shards(staging)
        digests[STATE] = _write(temporary / STATE, encoded_state)
        _write(temporary / MANIFEST, encode_manifest(step=step, written_by=__version__, digests=digests))
        fsync_folder(temporary)
        if os.path.lexists(final):
            _rename_bad(final, step=step)
        temporary.rename(final)
        try:
            fsync_folder(final.parent)
        except BaseException:
            # Not left to a later save of the same step: its fsync would call clean what this one may have lost.
            final.rename(temporary)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _rename_bad(path: Path, *, step: int) -> Path:
    return path.rename(path.with_name(f".bad-{step:012d}-{secrets.token_hex(4)}"))


def _write(path: Path, content: bytes) -> FileDigest:
    check_limit(path.name, size_bytes=len(content))
    path.write_bytes(content)
    return sync_and_digest(path)


def _check_tensors(name: str, group: Mapping[str, Tensor]) -> None:
    if len(group) > MAX_TENSORS:
        raise CheckpointError(
            f"{name}.safetensors would hold {len(group):,} tensors, more than {MAX_TENSORS:,}: join some"
        )
    for key, tensor in group.items():
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided or key == "__metadata__":
            raise CheckpointError(
                f"{name}.safetensors cannot hold {key!r} ({tensor.layout}, {tensor.dtype}): store it as a dense tensor "
                f"of another dtype, under a name other than '__metadata__'"
            )


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)
        fsync_folder(folder.parent)


def _free_bytes(folder: Path) -> str:
    try:
        return str(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown number"


# --- retention -------------------------------------------------------------------------------------------------------


def _prune(folder: Path, *, step: int, keep: int) -> None:
    """Retire what is older than the `keep` newest intact checkpoints up to `step`; later ones are left alone."""
    kept: list[int] = []
    for found, path in committed(folder):
        if found > step:
            continue
        if len(kept) == keep:
            _retire(path)
        elif verdict(path) is None:
            kept.append(found)
    for path in list(folder.iterdir()) if len(kept) == keep else ():
        match = _BAD_NAME.fullmatch(path.name)
        if match and int(match[1]) < kept[-1]:
            _retire(path)


def _retire(path: Path) -> None:
    """Delete in two moves, so that a kill in between leaves a leftover and never half a checkpoint."""
    doomed = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    path.rename(doomed)
    verdicts.pop(path, None)
    _delete(doomed)


def _remove_leftovers(folder: Path, *, but: Path | None = None) -> None:
    """Remove what dead attempts left. With one writer per folder, every temporary folder but its own is dead."""
    for path in folder.glob(".tmp-*"):
        if path != but:
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder; what resists is left for the next save."""
    with suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)
