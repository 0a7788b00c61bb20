"""What the tests of the processes share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.faults.processes.launched import train_whole
from tests.replicas import run_replicas
from tests.runs import trained


@pytest.fixture(scope="package")
def whole(tmp_path_factory):
    """What the run leaves that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_replicas(train_whole, world_size=2, args=(folder,))
    return SimpleNamespace(folder=folder, **trained(folder))
