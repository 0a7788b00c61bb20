"""`ray_train.py` on a real Ray with two CPU workers: a run to its end, and a worker that is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.launch import short_runs

SCRIPT = short_runs.ROOT / "launch" / "ray_train.py"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install 'ray[train]')"
)


def start(run_dir, task, *, log, **variables):
    """Start the driver; it brings its own Ray up on this machine and takes it down at its end."""
    command = [sys.executable, str(SCRIPT), "--num-workers", "2", "--run-dir", str(run_dir), *task]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    return subprocess.Popen(
        command, env=short_runs.environment(**quiet, **variables), stdout=log, stderr=log, start_new_session=True
    )


def end(driver):
    """End the driver, and with it the processes of its Ray that are still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    driver.wait()


def replicas_of(run_dir):
    """The replicas of a run that are alive, by rank."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            if line[1:4] == ["-m", "dptrain", "train"] and str(run_dir) in line:
                found[int(process.environ()["RANK"])] = process
    return found


def test_a_killed_worker_is_started_again_and_the_run_goes_on(tmp_path):
    """A worker that is killed takes its replica along; Ray starts the workers again, and they end the same run."""
    task = short_runs.write_task(tmp_path)
    short_runs.train_undisturbed(tmp_path / "undisturbed", task)
    run_dir, delay = tmp_path / "run", tmp_path / "delay"
    delay.write_text("0.3")
    with (tmp_path / "log").open("wb") as log:
        driver = start(run_dir, task, log=log, TEST_DELAY=str(delay))
    try:
        alive = {"alive": lambda: driver.poll() is None}
        short_runs.wait_until(lambda: short_runs.has_checkpoint(run_dir), what="a checkpoint", limit_s=240, **alive)
        victim = replicas_of(run_dir)[1]
        os.kill(victim.parent().pid, signal.SIGKILL)
        psutil.wait_procs([victim], timeout=60)
        assert not victim.is_running(), "the replica outlives its worker"
        delay.write_text("0")
        assert driver.wait(timeout=240) == 0, (tmp_path / "log").read_text()
    finally:
        end(driver)
    assert "resumed from step" in (tmp_path / "log").read_text()
    assert short_runs.outcome(run_dir) == short_runs.outcome(tmp_path / "undisturbed")


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    """A first start on the folder of another run is refused before Ray is asked for anything."""
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    command = [sys.executable, str(SCRIPT), "--run-dir", str(tmp_path)]
    done = subprocess.run(command, env=short_runs.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds a run: add --resume" in done.stderr
