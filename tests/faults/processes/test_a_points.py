"""A2 and A8: death, and a request to stop, at every named point of a step, of an evaluation and of a save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dptrain.checkpoint.store import load_newest
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import newest_step, write_config
from tests.faults.processes import strikes
from tests.replicas import run_replicas
from tests.runs import attempt, make_config, trained

POINTS = (*strikes.INSIDE_A_STEP, *strikes.BETWEEN_STEPS)
CALLS = {"data": 90, "forward": 8, "backward": 8, "reduction": 5, "update": 3, "evaluation": 8, "save": 1, "rename": 1}
"""How often a replica comes by a point until it is struck there: the checks before the first step come by some, too."""


SAMPLES = 2100


def train_whole(rank, world_size, folder):
    attempt(folder, config=make_config(folder, max_samples=SAMPLES))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the run leaves that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_replicas(train_whole, world_size=2, args=(folder,))
    return trained(folder)


def start(folder, *more, armed, log):
    settings = folder / "settings.yaml"
    write_config(settings, make_config(folder / "run", max_samples=SAMPLES, task=f"{strikes.__file__}:striking"))
    again = (folder / "run" / "config.yaml").exists()
    source = ["--run_dir", str(folder / "run"), "--resume"] if again else ["--config", str(settings)]
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dptrain", "train", "--replicas", "2", *source, *more],
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TEST_MICRO_STEP_S": "0.01",
                "TEST_STRIKES": str(armed),
                "PYTHONPATH": str(Path(__file__).parents[3]),
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def test_a2_killed_at_every_point_a_run_ends_the_same(whole, tmp_path):
    """One run that dies at each of the points in turn and is started again: the bytes of the undisturbed run."""
    armed, log = tmp_path / "armed", tmp_path / "log"
    remaining, saved = list(POINTS), 0
    strikes.arm(armed, None)
    process = start(tmp_path, armed=armed, log=log)
    deadline_s = time.monotonic() + 200
    while process.poll() is None:
        assert time.monotonic() < deadline_s, log.read_text()
        # Without a new checkpoint in between, the launcher would give up; armed before it has started the replicas
        # again, the next point may strike the other of the two that are dying anyway.
        is_restarted = log.read_text().count("starting again") == len(POINTS) - len(remaining)
        if remaining and is_restarted and strikes.disarmed(armed) and newest_step(tmp_path / "run") > saved:
            saved, point = newest_step(tmp_path / "run"), remaining.pop(0)
            strikes.arm(armed, point, calls=CALLS[point])
        time.sleep(0.005)
    output = log.read_text()
    assert process.returncode == 0, output
    assert not remaining
    assert output.count("starting again") == len(POINTS)
    assert trained(tmp_path / "run") == whole


def test_a8_asked_to_stop_at_any_point_the_step_is_finished_and_saved(whole, tmp_path):
    """SIGTERM to one replica at any moment: exit code 75 within 5 s, no logged step is lost, the same end.

    At every second point: each takes a launch of its own.
    """
    armed, log = tmp_path / "armed", tmp_path / "log"
    for point in POINTS[::2]:
        strikes.arm(armed, point, number=signal.SIGTERM, calls=CALLS[point])
        process = start(tmp_path, armed=armed, log=log)
        while process.poll() is None and not strikes.disarmed(armed):
            time.sleep(0.005)
        struck_s = time.monotonic()
        code = process.wait(timeout=240)
        assert code == 75, (point, log.read_text())
        assert time.monotonic() - struck_s < 5 + 5, f"{point}: 5 s, and what a busy machine takes on top"
        reported = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
        assert load_newest(tmp_path / "run" / "checkpoints").step == reported, point
    strikes.arm(armed, None)
    assert start(tmp_path, armed=armed, log=log).wait(timeout=240) == 0, log.read_text()
    assert trained(tmp_path / "run") == whole
