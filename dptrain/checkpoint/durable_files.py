"""Files and folders made durable: synced to disk, hashed, for their owner alone; what they mean is not known here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dptrain.checkpoint.manifest import FileDigest
from dptrain.checkpoint.verified_files import digest_of

if TYPE_CHECKING:
    from pathlib import Path


def sync_and_digest(path: Path) -> FileDigest:
    """Make a file durable and private, and say what it holds."""
    path.chmod(0o600)
    with path.open("rb", buffering=0) as file:
        digest = digest_of(file)
        os.fsync(file.fileno())
        return FileDigest(size_bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
