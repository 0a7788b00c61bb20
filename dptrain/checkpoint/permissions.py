"""Who else may change the files of a run: a warning to its owner; nothing is changed here."""

from __future__ import annotations

import os
import stat
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_MAX_NAMED = 3


def warn_if_exposed(folder: Path) -> None:
    """Warn, in one sentence, where others can change `folder` or what is directly in it.

    Checksums find damage, not malice: anyone who can write to a checkpoint decides what the run continues with.
    Others are every user but this one and root, and a group that is not this process's own. A run works all the same:
    shared folders are common, and only their owner knows whether they are meant.
    """
    try:
        exposed = [f"{path.name}: {reason}" for path in (folder, *folder.iterdir()) for reason in _reasons(path)]
    except OSError:
        return  # it cannot be listed; the error follows when it is read or written
    if exposed:
        more = f" and {len(exposed) - _MAX_NAMED} more" if len(exposed) > _MAX_NAMED else ""
        warnings.warn(
            f"others can change what this run reads in {folder} ({'; '.join(exposed[:_MAX_NAMED])}{more}): make it "
            f"yours alone with `chown -R` and `chmod -R go-w`, unless that is meant",
            RuntimeWarning,
            stacklevel=2,
        )


def _reasons(path: Path) -> Iterator[str]:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return  # its own mode means nothing, and no checkpoint is read through it
    if found.st_uid not in {os.geteuid(), 0}:
        yield f"owned by user {found.st_uid}"
    # Where each user has a group of their own, files of that group's mode are the user's alone.
    by_group = found.st_mode & stat.S_IWGRP and found.st_gid != os.getegid()
    if found.st_mode & stat.S_IWOTH or by_group:
        yield f"mode {stat.S_IMODE(found.st_mode):04o}"
