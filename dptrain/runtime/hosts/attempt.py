"""Whether this attempt goes on with what an earlier attempt of the same launch began: rank 0 decides, all follow."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from dptrain.runtime.rendezvous import launcher_process
from dptrain.runtime.step_reduction import broadcast_from_rank_0
from dptrain.tracking.run_folder import default_run_dir, holds_run, launch_of

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MOST_SEARCHED = 100  # run folders of the same task, newest first


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What rank 0 has decided on an attempt.

    Attributes:
        run_dir: the run folder, the same text on all replicas.
        resume: whether to go on from its newest checkpoint.
        launch: marks of the launchers of all replicas, to be left in the run folder; empty without torchrun.
    """

    run_dir: str
    resume: bool
    launch: tuple[int, ...] = ()


def decide_attempt(*, run_dir: str | None, task: str, resume: bool, device: torch.device) -> Attempt:
    """Decide whether replicas that torchrun started go on with a run. A collective; waits.

    torchrun starts replicas again with the arguments of the first time, after a failure and after a change of
    membership, and each agent counts only its own restarts. So the run folder keeps the marks of the agents of the
    latest attempt: where one of them is here again, this is the same launch, and its run goes on. A new launch has
    other agents, so that an old folder is refused unless `--resume` is given.

    Args:
        run_dir: as given; None for the default, in which a run of this launch is looked for.
        task: as given.
        resume: whether it was asked for.
        device: where the collective runs.
    """
    own = _mark()
    marks = _gathered(own, device=device)
    if not any(marks):
        return Attempt(run_dir=run_dir or default_run_dir(task), resume=resume)
    decided: list[int] = []
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder, again = _search(run_dir, task=task, marks=marks)
        decided = [int(resume or again), *folder.encode()]
    resumes, *path = broadcast_from_rank_0(decided, device=device) if dist.is_initialized() else decided
    return Attempt(run_dir=bytes(path).decode(), resume=bool(resumes), launch=tuple(sorted({*marks} - {0})))


def _search(run_dir: str | None, *, task: str, marks: list[int]) -> tuple[str, bool]:
    """Return the run folder, and whether an attempt of this launch has begun a run in it."""
    default = default_run_dir(task)
    folders = [Path(run_dir)] if run_dir else _of_task(Path(default))
    for folder in folders:
        if {*launch_of(folder)} & {*marks} - {0} and holds_run(folder):
            return str(folder), True
    return run_dir or default, False


def _of_task(default: Path) -> list[Path]:
    """Return the folders that runs of a task have by default, newest first."""
    stem = default.name.rsplit("-", 2)[0]
    try:
        return sorted(default.parent.glob(f"{stem}-????????-??????"), reverse=True)[:_MOST_SEARCHED]
    except OSError:
        return []


def _gathered(mark: int, *, device: torch.device) -> list[int]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mark]
    own = torch.tensor([mark], device=device)
    marks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(marks, own)
    return [int(found) for found in marks]


def _mark() -> int:
    """Return 63 bits that tell the torchrun agent above this process from every other; 0 where there is none."""
    agent = launcher_process() if "TORCHELASTIC_RUN_ID" in os.environ else None
    if agent is None:
        return 0
    try:
        boot = _BOOT_ID.read_text(encoding="ascii") if _BOOT_ID.exists() else ""
        who = [platform.node(), boot, agent.pid, agent.create_time(), os.environ["TORCHELASTIC_RUN_ID"]]
    except (OSError, psutil.Error):
        return 0
    return (int.from_bytes(hashlib.sha256(json.dumps(who).encode()).digest()[:8], "big") >> 1) or 1
