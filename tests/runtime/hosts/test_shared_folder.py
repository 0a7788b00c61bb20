"""Whether all hosts see one run folder: a file of rank 0 is compared, and who sees another one is named."""

from __future__ import annotations

import os

import pytest
import torch

from dptrain.errors import ConfigError
from dptrain.runtime.hosts import shared_folder
from dptrain.runtime.hosts.shared_folder import check_shared_folder
from tests.replicas import run_replicas

CPU = torch.device("cpu")


def check(rank, world_size, folder, own, local):
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    shared_folder._PATIENCE_S = 0.5
    path = folder / (str(rank) if own else "shared")
    path.mkdir(exist_ok=True)
    if own or rank == 0:
        (path / "config.yaml").write_text(f"{rank if rank > 1 else 0}")
    try:
        check_shared_folder(path, name="config.yaml", device=CPU)
    except ConfigError as error:
        return str(error)
    return ""


def test_one_folder_passes(tmp_path):
    """As soon as the file is seen, which on network file systems takes a while."""
    assert run_replicas(check, world_size=3, args=(tmp_path, False, 1)) == ["", "", ""]


def test_folders_of_one_name_are_distinguished_by_their_content(tmp_path):
    """The rank that sees another one is named, on all replicas; two hosts with equal files pass for one folder."""
    for reported in run_replicas(check, world_size=3, args=(tmp_path, True, 1)):
        assert "is not shared between the hosts: rank 2 of 3 does not see there what rank 0 sees" in reported


def test_on_one_host_nothing_is_compared(tmp_path):
    """All replicas of it have one file system."""
    assert run_replicas(check, world_size=3, args=(tmp_path, True, 3)) == ["", "", ""]


@pytest.mark.parametrize("content", [None, "", "a"])
def test_a_file_that_is_missing_is_not_one_that_is_empty(tmp_path, content):
    """Nothing has the digest of no file but no file."""
    path = tmp_path / "file"
    if content is not None:
        path.write_text(content)
    assert (shared_folder._digest(path) == 0) == (content is None)
