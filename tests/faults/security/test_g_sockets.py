"""Rows G8 and G9 of the faults: what a run on one node listens on, and what it makes of strangers who call there.

The warning for several nodes is in tests/runtime/test_rendezvous.py.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import write_config
from tests.replicas import run_replicas
from tests.runs import attempt, make_config, result_of

ROOT = Path(__file__).parents[3]
NUM_HALF_OPEN = 200
NOISE_BYTES = 2**20


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """A run of two replicas; its listening sockets; noise and silence on each of them; and how it ended."""
    folder = tmp_path_factory.mktemp("visited")
    write_config(folder / "settings.yaml", replace(make_config(folder / "run"), num_workers=1))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TEST_MICRO_STEP_S": "0.1"}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        environment.pop(name, None)
    run = subprocess.Popen(
        [sys.executable, "-m", "dptrain", "train", "--replicas", "2", "--config", str(folder / "settings.yaml")],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (run_is_at(folder / "run", step=3)):
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        sockets = [socket for member in family for socket in member.net_connections(kind="inet")]
        listening = [connection.laddr for connection in sockets if connection.status == psutil.CONN_LISTEN]
        with contextlib.ExitStack() as stack:
            for address in listening:
                send_noise(address)
                for _ in range(NUM_HALF_OPEN // len(listening)):
                    stack.enter_context(socket.create_connection(address, timeout=5))
            assert run.poll() is None
            output, _ = run.communicate(timeout=90)
    finally:
        run.kill()
        run.wait()
    return SimpleNamespace(run=folder / "run", family=family, listening=listening, code=run.returncode, output=output)


def run_is_at(folder, *, step):
    path = folder / "metrics.jsonl"
    return path.exists() and any(row["step"] >= step for row in read_rows(path))


def send_noise(address):
    """Send what no peer would; who is hung up on has sent enough."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as stranger:
        stranger.sendall(secrets.token_bytes(NOISE_BYTES))


def test_g8_one_node_listens_on_loopback_alone(visited):
    """Launcher, replicas, loading processes: no store has a port, and those of the replicas face inwards."""
    assert len(visited.family) == 5
    assert visited.listening
    assert all(ipaddress.ip_address(address.ip).is_loopback for address in visited.listening)


def test_g9_strangers_change_nothing(visited, tmp_path):
    """Noise and half-open connections on every port: the run goes on and ends as without them."""
    assert visited.code == 0, visited.output
    assert "Traceback" not in visited.output
    run_replicas(train_alone, world_size=2, args=(tmp_path,))
    undisturbed, found = result_of(tmp_path), result_of(visited.run)
    for part in ("parameters", "optimizer", "rows", "decisions"):
        assert found[part] == undisturbed[part], part


def train_alone(rank, world_size, folder):
    attempt(folder)
