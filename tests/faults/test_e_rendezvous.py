"""Rows E8 and E10 of the faults: replicas that lose their meeting point, or never come to it.

E9 (a replica that ends early with exit code 0) is among the crashes of processes/test_a_processes.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from dptrain.cli.main import main
from dptrain.tracking.run_folder import newest_step, write_config
from tests.runs import make_config

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DPTRAIN = ("-m", "dptrain", "train")


def test_e8_without_the_store_all_replicas_end(tmp_path):
    """Under torchrun rank 0 serves the store: when it is killed, all are gone within seconds, and torchrun says why.

    Those that it starts again meet at a new store and go on with the run.
    """
    settings, run_dir = tmp_path / "settings.yaml", tmp_path / "run"
    write_config(settings, replace(make_config(run_dir), max_samples=100_000))
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, *TORCHRUN, "--max-restarts", "1", *DPTRAIN, "--config", str(settings)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        wait_until(lambda: newest_step(run_dir) > 0, launcher)
        replicas = psutil.Process(launcher.pid).children()
        (rank_0,) = [replica for replica in replicas if replica.environ()["RANK"] == "0"]
        began_s = time.monotonic()
        rank_0.kill()
        _, still = psutil.wait_procs(replicas, timeout=20)
        took_s = time.monotonic() - began_s
        wait_until(lambda: "resumed from step" in (tmp_path / "log").read_text(), launcher)
    finally:
        launcher.terminate()
        launcher.wait(timeout=240)
    assert not still
    assert took_s < 5
    assert "exitcode: -9" in (tmp_path / "log").read_text()


def wait_until(is_so, process):
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)


def test_e10_a_replica_that_never_starts_is_named(tmp_path, monkeypatch, capsys):
    """After the time for joining, by exit code 69 and in one sentence."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "DPTRAIN_JOIN_TIMEOUT_S": 0.5}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("DPTRAIN_STORE", str(tmp_path / "store"))
    began_s = time.monotonic()
    assert main(["train", "--task", "quadratic", "--run_dir", str(tmp_path / "run")]) == 69
    assert time.monotonic() - began_s < 10
    left = json.loads((tmp_path / "replica-0.json").read_text())  # for the launcher, which tells it once
    assert left["sentence"] == "timed out after 0.5 s waiting for rank 1 of 2; check its log"
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()
