"""Whether an attempt goes on with what an earlier one of the same launch began; rank 0 decides for all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dptrain.runtime.hosts import attempt as attempts
from dptrain.runtime.hosts.attempt import decide_attempt
from dptrain.tracking.run_folder import RunFolder
from tests.replicas import run_replicas

CPU = torch.device("cpu")


def decided(run_dir, *, mark, resume=False, task="digits"):
    """Decide as a replica of the agent with this mark; 0: of none."""
    attempts._mark = lambda: mark
    return decide_attempt(run_dir=None if run_dir is None else str(run_dir), task=task, resume=resume, device=CPU)


@pytest.fixture(autouse=True)
def _own_mark(monkeypatch):
    monkeypatch.setattr(attempts, "_mark", attempts._mark)


def begin_run(folder, *, launch):
    """Leave what an attempt leaves that has begun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    RunFolder(folder, resume=True, launch=launch).close()


def test_without_torchrun_it_is_as_asked(tmp_path):
    """Whatever is in the folder: our launcher passes --resume by itself."""
    begin_run(tmp_path, launch=[7])
    assert not decided(tmp_path, mark=0).resume
    assert decided(tmp_path, mark=0, resume=True).resume
    assert decided(tmp_path, mark=0).launch == ()


def test_an_attempt_of_the_same_launch_goes_on(tmp_path):
    """The folder has the mark of an agent that is here: torchrun has started the replica again."""
    begin_run(tmp_path, launch=[7, 8])
    assert decided(tmp_path, mark=8).resume
    assert decided(tmp_path, mark=8).launch == (8,)


@pytest.mark.parametrize("launch", [[], [9]])
def test_another_launch_does_not_go_on_by_itself(tmp_path, launch):
    """An old folder: it is refused where it is opened, at each of torchrun's attempts."""
    begin_run(tmp_path, launch=launch)
    assert not decided(tmp_path, mark=8).resume
    assert decided(tmp_path, mark=8, resume=True).resume


def test_an_attempt_that_had_begun_no_run_begins_one(tmp_path):
    """The one before was killed before it opened the folder."""
    assert not decided(tmp_path / "none", mark=8).resume
    (tmp_path / ".launch").write_text("[8]")
    assert not decided(tmp_path, mark=8).resume


def test_a_run_without_a_named_folder_is_found_again(tmp_path, monkeypatch):
    """Its default name has the time in it: the attempt that follows would begin another run from the beginning."""
    monkeypatch.chdir(tmp_path)
    begin_run(Path("runs/digits-20260101-000000"), launch=[7])
    begin_run(Path("runs/digits-20260102-000000"), launch=[8])
    begin_run(Path("runs/patches-20260103-000000"), launch=[8])
    found = decided(None, mark=8)
    assert (found.run_dir, found.resume) == ("runs/digits-20260102-000000", True)
    new = decided(None, mark=9)
    assert new.run_dir.startswith("runs/digits-")
    assert not new.resume


def decide_on_two(rank, world_size, folder):
    marks = (5, 6)  # each host has its own agent; that of rank 0 was started anew
    found = [decided(folder if rank == 0 else "elsewhere", mark=marks[rank])]
    dist.barrier()
    if rank == 0:
        begin_run(folder, launch=[4, 6])
    dist.barrier()
    found.append(decided(folder if rank == 0 else "elsewhere", mark=marks[rank]))
    return [(one.run_dir, one.resume, one.launch) for one in found]


def test_rank_0_decides_for_all(tmp_path):
    """By the marks of all agents: one that stayed is enough. All get rank 0's folder and decision."""
    first, second = run_replicas(decide_on_two, world_size=2, args=(tmp_path / "ä",))
    assert first == second == [(str(tmp_path / "ä"), False, (5, 6)), (str(tmp_path / "ä"), True, (5, 6))]


def test_a_process_that_no_torchrun_has_started_has_no_mark(monkeypatch):
    """Its variables may be left over."""
    assert attempts._mark() == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(attempts, "launcher_process", lambda: None)
    assert attempts._mark() == 0


def test_the_mark_is_that_of_the_agent_above(monkeypatch):
    """Equal for all that it starts, at every attempt; another for another run id."""
    import psutil

    monkeypatch.setattr(attempts, "launcher_process", lambda: psutil.Process(os.getpid()))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    mark = attempts._mark()
    assert mark == attempts._mark() > 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "other")
    assert attempts._mark() != mark
