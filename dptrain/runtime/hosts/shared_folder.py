"""Whether all hosts see one and the same run folder; compared where there are several, before anything is trained."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from dptrain.errors import ConfigError
from dptrain.runtime.step_reduction import on_rank_0
from dptrain.tracking.run_folder import check_not_in_use

_PATIENCE_S = 10.0
"""How long a file that rank 0 has written may take to appear on another host: network file systems keep what they know
of a folder for some seconds (NFS: 3 s at least, by default)."""


def check_resumable(run_dir: Path, *, device: torch.device) -> None:
    """Refuse to resume a run that another process trains, or whose folder hosts do not share. A collective; waits."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    on_rank_0(lambda: check_not_in_use(run_dir), rank=rank, device=device)
    check_shared_folder(run_dir, device=device)


def check_shared_folder(run_dir: Path, *, device: torch.device, name: str = "config.yaml") -> None:
    """Refuse a run folder that is another one on another host. A collective; waits, but not on one host.

    Args:
        run_dir: the run folder.
        device: where the collective runs.
        name: of a file in it that rank 0 has written, or has found.

    Raises:
        ConfigError: naming the ranks that see another folder, on all replicas alike.
    """
    if not dist.is_initialized() or dist.get_world_size() <= int(os.environ.get("LOCAL_WORLD_SIZE") or 0):
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    expected = torch.tensor([_digest(run_dir / name) if rank == 0 else 0], device=device)
    dist.broadcast(expected, src=0)
    own = _awaited(run_dir / name, int(expected))
    found = torch.zeros(world_size, dtype=torch.int64, device=device)
    found[rank] = own
    dist.all_reduce(found)
    others = [other for other in range(1, world_size) if int(found[other]) != int(expected)]
    if others:
        here = f" ({platform.node()})" if rank in (0, *others) else ""
        seen_by = ", ".join(map(str, others[:8]))
        raise ConfigError(
            f"run folder {run_dir} is not shared between the hosts: rank{'s' if len(others) > 1 else ''} {seen_by} of "
            f"{world_size} do{'' if len(others) > 1 else 'es'} not see there what rank 0 sees{here}: put --run_dir on "
            "storage that all hosts mount, by its absolute path"
        )


def _awaited(path: Path, expected: int) -> int:
    """Return the digest of a file as soon as it is the expected one, or what it is when patience ends."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while (own := _digest(path)) != expected and time.monotonic() < deadline_s:
        with suppress(OSError):
            os.listdir(path.parent)  # noqa: PTH208 - has a network file system look again
        time.sleep(0.1)
    return own


def _digest(path: Path) -> int:
    """Return 63 bits of a file's content and 0 where there is none."""
    try:
        return int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:8], "big") >> 1 | 1
    except OSError:
        return 0
