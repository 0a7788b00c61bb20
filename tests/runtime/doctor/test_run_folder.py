"""The run folder: written, measured, left as it was; and looked for from another host."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from dptrain.runtime.doctor import run_folder
from dptrain.runtime.doctor.finding import Status
from dptrain.runtime.doctor.run_folder import check_writable, made, mark, sees

ROOT = Path(__file__).parents[3]


def test_a_good_folder_is_left_as_it_was(tmp_path):
    """The check says how much room there is and how fast it writes, and leaves no file."""
    (tmp_path / "config.yaml").touch()
    finding = check_writable(tmp_path)
    assert finding.status is not Status.FAILURE
    assert finding.figures["write_bytes_per_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_that_is_made_is_removed_again(tmp_path):
    """What was not there before is not there afterwards, unless somebody has used it meanwhile."""
    with made(tmp_path / "a" / "b"):
        assert check_writable(tmp_path / "a" / "b").status is not Status.FAILURE
    assert list(tmp_path.iterdir()) == []
    with made(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_the_rank_that_made_the_folder_waits_for_the_others_on_its_host(tmp_path):
    """The one that made it leaves first, while another's file is still inside: the folder goes with the file."""
    with ThreadPoolExecutor() as pool, ExitStack() as maker:
        maker.enter_context(made(tmp_path / "run"))
        with made(tmp_path / "run"), mark(tmp_path / "run"):
            left = pool.submit(maker.close)
        left.result()
    assert list(tmp_path.iterdir()) == []


READ_ONLY = """
import os, sys
from pathlib import Path
from dptrain.runtime.doctor.run_folder import check_writable
os.setuid(65534)
finding = check_writable(Path(sys.argv[1]))
print(finding.status, finding.text)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_a_folder_of_another_user_is_a_failure(tmp_path_factory):
    """Without the right to write, the folder and the system's reason are named."""
    folder = Path("/tmp") / tmp_path_factory.mktemp("foreign").name  # noqa: S108 - pytest's own is closed to others
    folder.mkdir(mode=0o755)
    try:
        command = [sys.executable, "-c", READ_ONLY, str(folder)]
        reported = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    finally:
        folder.rmdir()
    assert reported == f"failure {folder} cannot be written: Permission denied\n"


def test_a_full_disk_is_a_failure(tmp_path, monkeypatch):
    """No room on the device is named, and what was begun is removed."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    finding = check_writable(tmp_path)
    assert finding.status is Status.FAILURE
    assert "No space left on device" in finding.text
    assert "--run-dir" in finding.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_mark_is_seen_where_it_is_and_nowhere_else(tmp_path, monkeypatch):
    """The same folder by another name shows the mark; another folder does not, after the wait for caches."""
    monkeypatch.setattr(run_folder, "_APPEARS_S", 0.3)
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(here)
    with mark(here) as name:
        assert sees(tmp_path / "link", name)
        assert not sees(other, name)
        assert not sees(tmp_path / "missing", name)
    assert list(here.iterdir()) == []
