"""`examples/elastic_ddp.py`: stopped and started on another number of processes, it trains what one process trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def train(state, *, processes):
    """The losses of one start, by step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "elastic_ddp.py"), str(state)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^step (\d+): .* loss (\S+)$", done.stdout, re.MULTILINE)
    return {int(step): float(loss) for step, loss in lines}


def test_the_number_of_processes_changes_nothing(tmp_path):
    """Two starts with three and two processes print the losses of two starts with one, and none twice."""
    changing = train(tmp_path / "a", processes=3) | train(tmp_path / "a", processes=2)
    alone = train(tmp_path / "b", processes=1) | train(tmp_path / "b", processes=1)
    assert list(changing) == list(range(1, 41))
    assert changing == pytest.approx(alone, rel=1e-4)
    assert changing[40] < changing[1]
