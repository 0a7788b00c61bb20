"""Whether a run folder can be written, is safe to rename in, and is the same folder on all hosts."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dptrain.runtime.doctor.finding import Finding, Status

_PROBE_BYTES = 4 * 2**20
_LEAST_FREE_BYTES = 2**30
_SLOW_BYTES_PER_S = 10e6  # a checkpoint of a GPT-2 small with AdamW, 1.5 GB, then takes over two minutes
_APPEARS_S = 5.0  # NFS shows a new file of another host after its attribute cache has expired, 3 s by default
_LOOK_EVERY_S = 0.1
_PREFIX = ".dptrain-doctor-"


def check_writable(folder: Path) -> Finding:
    """Write, flush, rename and remove a file in `folder`, as a checkpoint does."""
    check = "run folder"
    try:
        rate = _write_rate(folder)
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror or error}"
        remedy = "give this user the right to write there, make room, or choose another folder with --run-dir"
        return Finding(check=check, status=Status.FAILURE, text=text, remedy=remedy)
    free = shutil.disk_usage(folder).free
    figures = {"free_bytes": free, "write_bytes_per_s": round(rate)}
    text = f"{folder}: writable, {free / 2**30:.3g} GiB free, {rate / 1e6:.3g} MB/s"
    if free < _LEAST_FREE_BYTES:
        remedy = "make room, or choose another folder with --run-dir; checkpoint.keep bounds what a run takes"
        return Finding(check=check, status=Status.WARNING, text=f"little room: {text}", remedy=remedy, figures=figures)
    if rate < _SLOW_BYTES_PER_S:
        remedy = "choose a faster folder with --run-dir; each checkpoint is written there"
        return Finding(check=check, status=Status.WARNING, text=f"slow: {text}", remedy=remedy, figures=figures)
    return Finding(check=check, text=text, figures=figures)


def _write_rate(folder: Path) -> float:
    """Return bytes per second of a small file on its way to the disk."""
    path, renamed = (folder / f"{_PREFIX}{secrets.token_hex(8)}{end}" for end in ("", ".renamed"))
    began_s = time.perf_counter()
    try:
        with path.open("xb") as file:
            file.write(secrets.token_bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        path.replace(renamed)
    finally:
        for leftover in (path, renamed):
            with contextlib.suppress(OSError):
                leftover.unlink()
    return _PROBE_BYTES / (time.perf_counter() - began_s)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make the folder where there is none, and remove afterwards what was made and is still empty.

    Ranks of one host share the folder, and the one that made it may leave before another has removed its own file.

    Raises:
        OSError: where it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if missing:
            _wait_until(lambda: not any(folder.glob(f"{_PREFIX}*")))
        for path in missing:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                path.rmdir()


@contextmanager
def mark(folder: Path) -> Iterator[str]:
    """Leave a file in the folder while it is entered; its name is for the others to look for.

    Raises:
        OSError: where it cannot be written.
    """
    path = folder / f"{_PREFIX}{secrets.token_hex(8)}"
    path.touch()
    try:
        yield path.name
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def sees(folder: Path, name: str) -> bool:
    """Tell whether a file that another host has made is in the folder here; waits until caches have expired."""
    # A listing asks the server; a look-up may be answered from the cache.
    return _wait_until(lambda: any(path.name == name for path in folder.iterdir()))


def _wait_until(is_so: Callable[[], bool]) -> bool:
    """Ask again until it is so, for as long as a file of another host may take to appear or to go."""
    deadline_s = time.monotonic() + _APPEARS_S
    while True:
        with contextlib.suppress(OSError):
            if is_so():
                return True
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_LOOK_EVERY_S)
