"""Several hosts, each a network namespace with its own torchrun: hosts that die, join, leave, or lose their link."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks.hosts.namespaces import network, reason_to_skip, until
from dptrain.checkpoint.store import load_newest
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import newest_step, write_config
from dptrain.train import CheckpointConfig, LogConfig
from tests.replicas import run_replicas
from tests.runs import attempt, make_config, without_clock

RECOVERY_S = 40.0
BUSY = 2.0
"""Everything takes longer on a machine with other work; what must hold on a quiet one is asserted with this factor."""
SETTINGS = {
    "max_samples": 1600,
    "checkpoint": CheckpointConfig(every_samples=100),
    "log": LogConfig(tracker="none", eval_every_samples=800),
}

_reason = reason_to_skip()
pytestmark = pytest.mark.skipif(bool(_reason), reason=_reason or "hosts can be made")


def undisturbed(rank, world_size, folder, layout):
    attempt(folder, config=make_config(folder, layout_replicas=layout, **SETTINGS))


def whole_run(folder, *, world_size, layout):
    """Train without any disturbance; return the folder."""
    run_replicas(undisturbed, world_size=world_size, args=(folder, layout))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of two replicas that nobody disturbs."""
    return whole_run(tmp_path_factory.mktemp("whole"), world_size=2, layout=2)


@pytest.fixture(scope="module")
def whole_alone(tmp_path_factory):
    """The run that one replica begins, and that nobody disturbs."""
    return whole_run(tmp_path_factory.mktemp("alone"), world_size=1, layout=1)


class Cluster:
    """A run on some hosts."""

    def __init__(self, hosts, folder, *, nnodes, layout, micro_step_s=0.04, **environment):
        self.hosts, self.run, self.nnodes = hosts, folder / "run", nnodes
        self.settings = folder / "settings.yaml"
        write_config(self.settings, make_config(self.run, layout_replicas=layout, **SETTINGS))
        self.environment = {
            "TEST_MICRO_STEP_S": micro_step_s,
            "DPTRAIN_COLLECTIVE_TIMEOUT_S": 30,
            **environment,
        }

    def start(self, *hosts):
        for host in hosts:
            host.start("--config", self.settings, nnodes=self.nnodes, **self.environment)

    def step(self):
        path = self.run / "metrics.jsonl"
        return max((row["step"] for row in read_rows(path)), default=0) if path.exists() else 0

    def world_size(self):
        rows = read_rows(self.run / "metrics.jsonl")
        return rows[-1].get("time/world_size") if rows else 0

    def text(self):
        return "\n".join(host.text() for host in self.hosts)

    def until_step(self, step, **more):
        """Wait for a step, and for a checkpoint to go on from."""
        is_there = lambda: self.step() >= step and newest_step(self.run) > 0  # noqa: E731 - two conditions
        return until(is_there, what=self.text, timeout_s=150, **more)

    def recovered(self, since_s, step):
        """Seconds from a disturbance until a step beyond it is done."""
        self.until_step(step + 1)
        return time.monotonic() - since_s

    def end(self):
        """Wait for the end of the run on all hosts that are up."""
        codes = [host.wait(240) for host in self.hosts if host.process is not None]
        assert set(codes) == {0}, self.text()


def rows_of(folder):
    """Train rows: every step once, in order, each with its window of samples."""
    rows = [row for row in read_rows(Path(folder) / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    position = 0
    for row in rows:  # each sample once: a window begins where the one before it has ended
        assert row["progress/samples"] - row["batch/global"] == position
        position = row["progress/samples"]
    return rows


def assert_same_end(folder, expected, *, bit_identical):
    """The same samples and decisions; parameters to the last bit, or to float tolerance with other world sizes."""
    found, wanted = rows_of(folder), rows_of(expected)
    assert [row["batch/global"] for row in found] == [row["batch/global"] for row in wanted]
    decisions, wanted_decisions = (
        [(row["step"], row["batch/before"], row["batch/after"]) for row in read_rows(path / "decisions.jsonl")]
        for path in (Path(folder), Path(expected))
    )
    assert decisions == wanted_decisions
    one, other = (load_newest(Path(path) / "checkpoints").tensors("model") for path in (folder, expected))
    for name, tensor in other.items():
        if bit_identical:
            assert torch.equal(one[name], tensor), name
        else:
            torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-5)
    if bit_identical:
        drop = ("time/", "throughput/", "ledger/")
        plain = lambda row: {key: value for key, value in without_clock(row).items() if not key.startswith(drop)}  # noqa: E731
        assert list(map(plain, found)) == list(map(plain, wanted))


def test_a_host_that_dies_and_returns_meets_the_other(tmp_path, whole):
    """Over 100 Mbit/s: host 2 of 2 is killed and started again; the run goes on within 40 s and ends bit-identical.

    The agent of host 2 counts its restarts anew, that of host 1 has counted one. Nobody passes --resume.
    """
    with network(tmp_path, 2) as net:
        for host in net.hosts:
            host.shape("100mbit")
        cluster = Cluster(net.hosts, tmp_path, nnodes="2", layout=2)
        cluster.start(*net.hosts)
        cluster.until_step(12)
        net.hosts[1].kill()
        since_s, step = time.monotonic(), cluster.step()
        cluster.start(net.hosts[1])
        assert cluster.recovered(since_s, step) <= BUSY * RECOVERY_S, cluster.text()
        cluster.end()
        output = cluster.text()
    assert "resumed from step" in output
    assert "unset RANK" not in output
    assert re.search(r"rank 1 on host1 of 2 did not answer", output), output
    assert_same_end(tmp_path / "run", whole, bit_identical=True)


def test_a_first_launch_onto_an_old_folder_is_refused_on_all_hosts_and_attempts(tmp_path, whole):
    """Torchrun tries again, and is refused again: no attempt of this launch has begun the run."""
    with network(tmp_path, 2) as net:
        cluster = Cluster(net.hosts, tmp_path, nnodes="2", layout=2)
        cluster.run.mkdir()
        (cluster.run / "metrics.jsonl").write_text("")
        for host in net.hosts:
            host.start("--config", cluster.settings, nnodes="2", max_restarts=1, **cluster.environment)
        assert all(host.wait(120) != 0 for host in net.hosts)
        assert cluster.text().count("already holds a run: add --resume") == 2, cluster.text()
        assert [path.name for path in cluster.run.iterdir()] == ["metrics.jsonl"]


def test_hosts_join_and_leave_and_the_run_goes_on_from_the_exact_step(tmp_path, whole_alone):
    """`--nnodes 1:3`: one host, then two, then three, then two: each sample once, the decisions of one host alone."""
    with network(tmp_path, 3) as net:
        first, second, third = net.hosts
        cluster = Cluster(net.hosts, tmp_path, nnodes="1:3", layout=1, micro_step_s=0.08)
        cluster.start(first)
        cluster.until_step(8)
        for joining, size in ((second, 2), (third, 3)):
            since_s = time.monotonic()
            cluster.start(joining)
            until(lambda size=size: cluster.world_size() == size, timeout_s=120, what=cluster.text)
            assert time.monotonic() - since_s <= BUSY * RECOVERY_S, cluster.text()
        since_s = time.monotonic()
        third.leave()
        until(lambda: cluster.world_size() == 2, timeout_s=120, what=cluster.text)
        assert time.monotonic() - since_s <= BUSY * RECOVERY_S, cluster.text()
        third.wait(60)
        third.process = None
        cluster.end()
    assert_same_end(tmp_path / "run", whole_alone, bit_identical=False)


def test_a_link_that_is_cut_for_12_s_costs_nothing_but_the_time(tmp_path, whole):
    """Shorter than the collectives wait: no attempt ends, and the run ends bit-identical."""
    with network(tmp_path, 2) as net:
        cluster = Cluster(net.hosts, tmp_path, nnodes="2", layout=2, DPTRAIN_COLLECTIVE_TIMEOUT_S=120)
        cluster.start(*net.hosts)
        cluster.until_step(12)
        net.hosts[1].cut()
        time.sleep(12)
        net.hosts[1].join()
        cluster.end()
        assert "resumed from step" not in cluster.text()
    assert_same_end(tmp_path / "run", whole, bit_identical=True)


def test_a_link_that_is_cut_for_longer_is_named_and_the_run_goes_on_when_it_is_back(tmp_path, whole):
    """Longer than the collectives wait: each side says who did not answer; a host whose agent gave up is started again.

    The run ends bit-identical all the same.
    """
    with network(tmp_path, 2) as net:
        cluster = Cluster(net.hosts, tmp_path, nnodes="2", layout=2, DPTRAIN_COLLECTIVE_TIMEOUT_S=6)
        cluster.start(*net.hosts)
        cluster.until_step(12)
        net.hosts[1].cut()
        until(lambda: "did not answer" in net.hosts[0].text(), timeout_s=60, what=cluster.text)
        until(lambda: "did not answer rank" in net.hosts[1].text(), timeout_s=60, what=cluster.text)
        net.hosts[1].kill()  # what a scheduler does with a host that it does not reach
        net.hosts[1].join()
        since_s, step = time.monotonic(), cluster.step()
        cluster.start(net.hosts[1])
        assert cluster.recovered(since_s, step) <= BUSY * RECOVERY_S, cluster.text()
        cluster.end()
    assert_same_end(tmp_path / "run", whole, bit_identical=True)


def test_a_run_folder_that_is_not_shared_is_called_that(tmp_path):
    """Each host has a folder of its own under the same name: refused before the first step."""
    with network(tmp_path, 2) as net:
        cluster = Cluster(net.hosts, tmp_path, nnodes="2", layout=2)
        write_config(cluster.settings, make_config(Path("run"), layout_replicas=2, **SETTINGS))
        for number, host in enumerate(net.hosts):
            own = tmp_path / f"disk{number}"
            own.mkdir()
            host.start("--config", cluster.settings, nnodes="2", max_restarts=0, cwd=own, **cluster.environment)
        assert all(host.wait(120) != 0 for host in net.hosts)
        output = cluster.text()
        assert (
            "run folder run is not shared between the hosts: rank 1 of 2 does not see there what rank 0 sees" in output
        )


def test_a_frozen_replica_on_another_host_is_named(tmp_path):
    """SIGSTOP on host 2: host 1 says so by rank and host, and not that its own replica hangs."""
    with network(tmp_path, 2) as net:
        cluster = Cluster(net.hosts, tmp_path, nnodes="2", layout=2, DPTRAIN_COLLECTIVE_TIMEOUT_S=5)
        cluster.start(*net.hosts)
        cluster.until_step(8)
        net.hosts[1].signal_replicas(signal.SIGSTOP)
        until(lambda: "did not answer" in net.hosts[0].text(), timeout_s=60, what=cluster.text)
        assert "rank 1 on host1 of 2 did not answer: killed, frozen, or behind a cut link" in net.hosts[0].text()
        assert "made no step for" not in net.hosts[0].text()


def test_what_a_cluster_leaves_is_one_run(tmp_path):
    """The helper's own words: rows that repeat a step, or leave one out, are found."""
    for steps, sound in (((1, 2, 3), True), ((1, 3), False), ((1, 2, 2), False)):
        rows = [
            {"kind": "train", "step": s, "progress/samples": 4 * n, "batch/global": 4} for n, s in enumerate(steps, 1)
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        if sound:
            assert len(rows_of(tmp_path)) == 3
        else:
            with pytest.raises(AssertionError):
                rows_of(tmp_path)
