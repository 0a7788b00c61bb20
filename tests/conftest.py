"""What all tests share."""

import getpass
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# A core for each worker, and for each process that a test starts. And a copy of a process that has used torch's pool of
# threads waits for that pool for ever, so nothing could be forked from a worker.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A save syncs a dozen files, and the suite makes thousands of saves: in memory that costs nothing, on a disk it was a
# third of the suite's time. The fixture `on_disk` is for tests that need another place.
_MEMORY, _ENOUGH_BYTES = "/dev/shm", 4 << 30  # noqa: S108 - all names in it are made by tempfile
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _ENOUGH_BYTES:
    # What torch has compiled stays where the next run finds it, and takes no memory.
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")
    )
    os.environ.setdefault("TMPDIR", _MEMORY)
    tempfile.tempdir = None  # what was found before

# Under nohup, or in the background of a script, SIGHUP or SIGINT are ignored, here and in all that is started from
# here: tests that send them would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Nor does hypothesis judge by the clock: on a busy machine an example takes many times its time.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)  # without xdist there is no such hook
def pytest_xdist_auto_num_workers():
    """One worker more than cores: there is always a file whose tests wait, for a time limit or a host that is gone."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture
def on_disk():
    """A folder that is not in memory, on another file system than `tmp_path` where that is."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True, scope="module")
def _state_of_accelerate():
    """Leave none to the next file: a loader at its end made each micro-batch there the last of a step."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
