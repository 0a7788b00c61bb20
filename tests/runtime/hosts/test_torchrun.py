"""torchrun with the exit code of the replica that failed first, on real processes that load nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dptrain.runtime.hosts.torchrun import first_code

REPLICA = """
import os, signal, sys, time
from pathlib import Path

case, rank, ready = sys.argv[1], os.environ["RANK"], Path(sys.argv[2])


def stop(*_):
    sys.exit(75 if case == "stopped" or rank == "0" else 3)


signal.signal(signal.SIGTERM, stop)
if case in ("stopped", "mixed"):
    (ready / f"{case}-{rank}").touch()
elif case == "done":
    sys.exit(0)
elif rank == "1":
    if case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(2)
while True:
    signal.pause()
"""
"""Rank 1 fails, or both wait to be stopped."""

DRIVER = """
import json, os, signal, sys, time
from dptrain.runtime.hosts.torchrun import main

script, ready = sys.argv[1:]
codes = {}
for case in ("wrong", "killed", "done", "stopped", "mixed"):
    pid = os.fork()
    if pid == 0:
        os._exit(main(["--standalone", "--nproc-per-node", "2", script, case, ready]))
    if case in ("stopped", "mixed"):
        while not all(os.path.exists(f"{ready}/{case}-{rank}") for rank in (0, 1)):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), f"{case} ended before it was stopped"
            time.sleep(0.02)
        os.kill(pid, signal.SIGTERM)
    codes[case] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(json.dumps(codes))
"""
"""Forks the launchers, so that torch is loaded once."""


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """Exit code by case, and what torchrun said."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "replica.py").write_text(REPLICA)
    command = [sys.executable, "-c", DRIVER, str(folder / "replica.py"), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1]), found.stderr


@pytest.mark.parametrize(
    ("case", "code"),
    [
        ("wrong", 2),
        ("killed", 128 + 9),
        ("done", 0),
        ("stopped", 75),  # by SIGTERM to torchrun, which all replicas answered with a checkpoint
        ("mixed", 128 + 15),  # one of them did not
    ],
)
def test_it_ends_with_the_code_of_its_replicas(endings, case, code):
    """By itself torchrun ends with 1 in each case but one."""
    assert endings[0][case] == code


def test_torchs_report_is_printed(endings):
    """The table of failures is what users of torchrun know."""
    assert "Root Cause (first observed failure):" in endings[1]


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ({0: (5, 70), 1: (4, 65)}, 65),
        ({0: (5, 70), 1: (5, 65)}, 65),  # in the same second rank 0 lost its peer
        ({0: (5, 70), 1: (5, -11)}, 139),
        ({0: (5, 70), 1: (6, 1)}, 1),  # whose traceback took a while
        ({0: (5, 70), 1: (5, 70)}, 70),
        ({1: (5, 2), 0: (5, 75)}, 2),  # torchrun stopped rank 0
        ({1: (5, 71), 0: (5, -15), 2: (5, 75)}, 71),
        ({0: (5, 75), 1: (5, 75)}, 75),
    ],
)
def test_the_first_failure_speaks(failures, code):
    """A cause before what may be its consequence, and then by time, and by the order in which they were found."""
    made = {rank: SimpleNamespace(timestamp=time, exitcode=ended) for rank, (time, ended) in failures.items()}
    assert first_code(made) == code
