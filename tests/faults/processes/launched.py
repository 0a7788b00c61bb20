"""`dptrain train` on two replicas in a process of its own, and what it leaves beside an undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil

from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import write_config
from tests.runs import attempt, make_config, trained

ROOT = Path(__file__).parents[3]


class Run:
    """`dptrain train` on two replicas, in a process of its own."""

    def __init__(self, log, *arguments, command=("-m", "dptrain"), micro_step_s=0.05, **environment):
        self.log = Path(log)
        # A session of its own, as that of a terminal.
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command, "train", "--replicas", "2", *map(str, arguments)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "TEST_MICRO_STEP_S": str(micro_step_s), **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        self.pid = self.process.pid

    def replicas(self):
        """The two of them, rank 0 first."""
        found = sorted(psutil.Process(self.pid).children(), key=lambda child: child.create_time())
        return found if len(found) == 2 else []

    def until(self, is_so):
        """Wait for something, which the run must live to see."""
        deadline = time.monotonic() + 60
        while not (found := is_so()):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.005)
        return found

    def until_step(self, folder, step):
        self.until(lambda: last_step(folder) >= step)

    def end(self):
        """Return exit code and output."""
        try:
            return self.process.wait(timeout=90), self.output()
        finally:
            self.close()

    def output(self):
        return self.log.read_text()

    def close(self):
        """End the launcher, and with it the replicas."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running(*arguments, **settings):
    run = Run(*arguments, **settings)
    try:
        yield run
    finally:
        run.close()


def last_step(folder):
    path = Path(folder) / "metrics.jsonl"
    return max((row["step"] for row in read_rows(path)), default=0) if path.exists() else 0


def settings_file(folder, **changes):
    """Settings of a run in `folder / "run"`."""
    path = folder / "settings.yaml"
    write_config(path, replace(make_config(folder / "run"), **changes))
    return path


def train_whole(rank, world_size, folder):
    attempt(folder)


def assert_undisturbed(folder, whole):
    for part, value in trained(folder).items():
        assert value == getattr(whole, part), part


def gone(process):
    """Whether a process runs no more; one that only waits to be buried does not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
