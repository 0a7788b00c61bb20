"""Who else can write to a run is reported in one warning, and nothing else is."""

from __future__ import annotations

import os
import warnings

import pytest

from dptrain.checkpoint.permissions import warn_if_exposed


@pytest.fixture
def folder(tmp_path):
    """One that is its owner's alone, with a file, a folder and a link in it."""
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    (path / "metrics.jsonl").touch(mode=0o600)
    (path / "checkpoints").mkdir(mode=0o700)
    (path / "link").symlink_to("/tmp")  # noqa: S108 -- where it points to does not matter
    return path


def test_a_private_folder_is_passed_without_a_word(folder):
    """Nor does a folder that others may read, one that is not there, or a group of one's own, say anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_exposed(folder)
        folder.chmod(0o755)
        warn_if_exposed(folder)
        folder.chmod(0o770)
        warn_if_exposed(folder)
        warn_if_exposed(folder / "missing")


@pytest.mark.parametrize("name", [".", "metrics.jsonl", "checkpoints"])
def test_what_others_may_write_is_named_with_its_mode(folder, name):
    """The folder itself or something in it."""
    (folder / name).chmod(0o707)
    with pytest.warns(
        RuntimeWarning, match=rf"others can change .*\({(folder / name).name}: mode 0707\).*chmod"
    ) as caught:
        warn_if_exposed(folder)
    assert len(caught) == 1


def test_a_long_list_is_cut(folder):
    """Ten files are three, and a count of the others."""
    for number in range(10):
        (folder / f"file-{number}").touch()
        (folder / f"file-{number}").chmod(0o666)
    with pytest.warns(RuntimeWarning, match=r"mode 0666 and 7 more\)"):
        warn_if_exposed(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_other_owners_and_groups_are_named(folder):
    """What another user owns can be changed by that user; a group counts unless it is this process's own."""
    os.chown(folder / "metrics.jsonl", 12345, -1)
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl: owned by user 12345"):
        warn_if_exposed(folder)
    os.chown(folder / "metrics.jsonl", 0, 12345)
    (folder / "metrics.jsonl").chmod(0o660)
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl: mode 0660"):
        warn_if_exposed(folder)
