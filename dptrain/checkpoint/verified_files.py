"""The files of one open checkpoint folder, read only as a manifest promises them; what they mean is not known here.

Everything goes by descriptor of the folder and plain name, follows no link and opens nothing but regular files. The
text of a CheckpointError is the bare reason: the caller says which checkpoint it is about.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dptrain.checkpoint.manifest import MANIFEST, MAX_JSON_BYTES, FileDigest
from dptrain.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO
    from pathlib import Path

_PIECE_BYTES = 1 << 24


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """Open a folder that is no link; gives its descriptor.

    Raises:
        OSError: where it is not there, is no folder or may not be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check_file(folder: int, name: str, digest: FileDigest) -> None:
    """Refuse a file that is not what its digest promises; it is never whole in memory."""
    with _opened_file(folder, name) as file:
        _check_size(file, name=name, digest=digest)
        sha256 = digest_of(file)
    if sha256 != digest.sha256:
        raise _wrong_digest(name)


def digest_of(file: FileIO) -> str:
    """Return the sha256 of what is left to read of a file."""
    # Not `hashlib.file_digest`: it asks for the interpreter lock eight times per MB, and a training loop beside it
    # may let each time wait for 5 ms.
    digest = hashlib.sha256()
    piece = memoryview(bytearray(min(_PIECE_BYTES, os.fstat(file.fileno()).st_size)))
    while num_bytes := file.readinto(piece):
        digest.update(piece[:num_bytes])
    return digest.hexdigest()


def verified_bytes(folder: int, name: str, digest: FileDigest) -> bytes:
    """Read a file whole, and verify the very bytes that are returned."""
    with _opened_file(folder, name) as file:
        _check_size(file, name=name, digest=digest)
        content = file.readall()
    if len(content) != digest.size_bytes or hashlib.sha256(content).hexdigest() != digest.sha256:
        raise _wrong_digest(name)
    return content


def manifest_bytes(folder: int) -> bytes:
    """Read the manifest, which only its own checksum covers, and not beyond its limit."""
    with _opened_file(folder, MANIFEST) as file:
        check_limit(MANIFEST, size_bytes=os.fstat(file.fileno()).st_size)
        return file.readall()


def check_limit(name: str, *, size_bytes: int) -> None:
    """Refuse a JSON file that is larger than is ever written or read."""
    if size_bytes > MAX_JSON_BYTES.get(name, size_bytes):
        raise CheckpointError(
            f"{name} has {size_bytes} bytes, more than the {MAX_JSON_BYTES[name]} that are written or read: "
            f"store large values as tensors"
        )


def _check_size(file: FileIO, *, name: str, digest: FileDigest) -> None:
    size_bytes = os.fstat(file.fileno()).st_size
    if size_bytes != digest.size_bytes:
        raise CheckpointError(f"{name} has {size_bytes} bytes and should have {digest.size_bytes}")
    check_limit(name, size_bytes=size_bytes)


def _wrong_digest(name: str) -> CheckpointError:
    return CheckpointError(f"the sha256 of {name} is not the one in {MANIFEST}")


@contextmanager
def _opened_file(folder: int, name: str) -> Iterator[FileIO]:
    # Looked at before it is opened, since opening a pipe or a device may do something; and again once it is open,
    # since it may have been exchanged in between.
    _check_kind(name, os.stat(name, dir_fd=folder, follow_symlinks=False))
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=folder), "rb", buffering=0) as file:
        _check_kind(name, os.fstat(file.fileno()))
        yield file


def _check_kind(name: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{name} is not a regular file")
    if found.st_nlink > 1:
        raise CheckpointError(
            f"{name} has {found.st_nlink} hard links, so that it can be changed from elsewhere: copy the checkpoint"
        )
