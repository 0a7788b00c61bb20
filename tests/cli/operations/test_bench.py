"""`dptrain bench` on two replicas, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from dptrain.train.execution.phases import PHASES


def bench(*more):
    command = [sys.executable, "-m", "dptrain", "bench", "--task", "digits", "--device", "cpu", *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def test_it_prints_speed_memory_and_bandwidth():
    """One line each, with positive figures; percentiles do not fall; no run folder is left."""
    ended = bench("--steps", "5", "--replicas", "2")
    assert ended.returncode == 0, ended.stderr
    speed = re.search(r"throughput +([\d,.]+) samples/s", ended.stdout)
    times = [float(found) for found in re.findall(r"(?:median|p90|p99) ([\d.]+) ms", ended.stdout)]
    assert float(speed[1].replace(",", "")) > 0
    assert 0 < times[0] <= times[1] <= times[2]
    assert len(re.findall(r"all-reduce +[\d,]+ KiB: [\d.]+ GB/s", ended.stdout)) == 4
    assert re.search(r"memory +[\d,]+ MiB", ended.stdout)
    assert re.search(r"mfu +not known: no peak is on record for this CPU \([\d.e+]+ FLOP/s per replica\)", ended.stdout)
    parts = re.findall(r"(\w+) ([\d.]+)%", ended.stdout)
    assert [name for name, _ in parts] == list(PHASES)
    assert sum(float(share) for _, share in parts) == pytest.approx(100, abs=1)


def test_no_steps_are_refused():
    """A number of steps below 1 is a wrong setting."""
    ended = bench("--steps", "0")
    assert ended.returncode == 2
    assert "--steps must be at least 1" in ended.stderr


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_dry_run_has_the_layout_and_the_parts_of_many_replicas(wrapper):
    """As rank 0 of 48 replicas that do not exist it takes its share of the batch, and says that it is a dry run."""
    ended = bench("--steps", "3", "--dry-run-replicas", "48", "--execution.wrapper", wrapper)
    assert ended.returncode == 0, ended.stderr
    assert "rank 0 of 48; the others do not exist" in ended.stdout
    assert "48 samples = 1 a micro-batch × 1 accumulation × 48 replicas" in ended.stdout
    assert "all-reduce" not in ended.stdout
    assert re.search(r"throughput +[\d,.]+ samples/s", ended.stdout)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dry-run-replicas", "0"], "--dry-run-replicas must be at least 1"),
        (["--dry-run-replicas", "2", "--replicas", "2"], "leave --replicas and the launcher out"),
        (["--dry-run-replicas", "2", "--noise.observer", "hook"], "use noise.observer=parameters"),
    ],
)
def test_a_dry_run_that_cannot_be_is_refused(more, message):
    """A number below 1, and replicas that do exist beside those that do not, are wrong settings."""
    ended = bench(*more)
    assert ended.returncode == 2
    assert message in ended.stderr
