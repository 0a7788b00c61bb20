"""Section E of the fault list: replicas that hang, lag, drift apart or mean different things."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
import torch.distributed as dist

from dptrain.errors import ConfigError, DesyncError
from dptrain.observe import PendingSum
from dptrain.runtime import stragglers
from dptrain.tracking.run_folder import write_config
from dptrain.tracking.run_log import WritingLog
from dptrain.train import Trainer
from dptrain.train import step as step_module
from dptrain.train.step import Stepper
from tests.replicas import run_replicas
from tests.runs import attempt, make_config, noisy, wait_for_step

TIMEOUT_S = 4.0


def start(folder, *more, **environment):
    """Start `dptrain train` on two replicas whose collectives and watchdogs wait for four seconds."""
    settings = folder.parent / "settings.yaml"
    write_config(settings, make_config(folder))
    return subprocess.Popen(
        [sys.executable, "-m", "dptrain", "train", "--replicas", "2", "--config", str(settings), *more],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TEST_MICRO_STEP_S": "0.05",
            "DPTRAIN_COLLECTIVE_TIMEOUT_S": str(TIMEOUT_S),
            **environment,
        },
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def replica_of(process, rank):
    """The process of one replica: the only one of its parent that has this rank."""
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("DPTRAIN_ATTEMPT") and child.environ().get("RANK") == str(rank):
            return child
    replicas = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    return replicas[rank]


def test_e1_a_replica_that_hangs_is_found_and_the_run_goes_on(tmp_path):
    """SIGSTOP for ever: found within the timeout and two seconds, stacks are shown, a restart ends the run."""
    process = start(tmp_path / "run", "--max-restarts", "1")
    wait_for_step(tmp_path / "run", 4, process)
    replica_of(process, 1).send_signal(signal.SIGSTOP)
    stopped_s = time.monotonic()
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "starting again" in line:
            break
    assert time.monotonic() - stopped_s < TIMEOUT_S + 2 + 3, "found, told and killed; the machine may be busy"
    rest, _ = process.communicate(timeout=240)
    output = "".join(lines) + rest
    assert process.returncode == 0, output
    assert "step.py" in output, "the stack of the replica that waited"


def test_e2_a_short_pause_is_none(tmp_path):
    """SIGSTOP for a second and a half, then SIGCONT: no restart, and the run ends as if nothing had been."""
    process = start(tmp_path / "run", "--max-restarts", "0")
    wait_for_step(tmp_path / "run", 4, process)
    replica = replica_of(process, 1)
    replica.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    replica.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "starting again" not in output


def test_e3_a_replica_that_holds_the_interpreter_lock_is_seen_by_its_watchdog():
    """The watchdog needs no interpreter: it shows the stack of a thread that sleeps with the lock, and ends it."""
    program = """
import ctypes
from dptrain.runtime.watchdog import Watchdog
with Watchdog(world_size=2, patience_s=1.0) as watchdog:
    watchdog.beat()
    ctypes.PyDLL(None).sleep(30)
"""
    began_s = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=25)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert 'File "<string>", line 6' in ended.stderr
    assert time.monotonic() - began_s < 15


def lag(rank, world_size, folder):
    """Train with a second replica that takes four times as long in each forward pass."""
    os.environ["TEST_MICRO_STEP_S"] = str(0.004 * (1 + 3 * rank))
    # The test cannot wait for a minute; tests/runtime/test_stragglers.py shows what it is for.
    stragglers.WINDOW_STEPS, stragglers.WINDOW_S = 3, 0.0
    notes = []
    WritingLog.note = lambda _, text: notes.append(text)
    attempt(folder, config=make_config(folder, max_samples=400))
    return notes


def test_e4_a_straggler_is_named_with_its_score(tmp_path):
    """Four times as slow as the other: named once, with how much longer it takes."""
    notes, _ = run_replicas(lag, world_size=2, args=(tmp_path,))
    reported = [note for note in notes if " slow: " in note]
    assert len(reported) == 1
    assert reported[0].startswith("rank 1 slow: forward time ")
    score = float(reported[0].split("forward time ")[1].partition("×")[0])
    assert 2 < score < 5


def drift(rank, world_size, folder):
    """Move one parameter of one replica by its last bit after step 6, and compare every second step."""
    take_step, messages = Stepper.step, []

    def step_and_drift(stepper, record, *, report):
        pending = take_step(stepper, record, report=report)
        if record.step == 6 and rank == 1:  # an update after it could round the difference away
            weight = stepper._model.module[3].weight
            with torch.no_grad():
                weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
        return pending

    Stepper.step = step_and_drift
    try:
        with pytest.raises(DesyncError) as caught:
            attempt_with(folder, replica_check_every_steps=2)
        messages.append(str(caught.value))
    finally:
        Stepper.step = take_step
    return messages


def attempt_with(folder, **settings):
    Trainer(make_config(folder, **settings), task=noisy).run()


@pytest.mark.parametrize("world_size", [2, 3])
def test_e5_parameters_that_drift_apart_by_one_bit_are_found(tmp_path, world_size):
    """At the next comparison all replicas stop; of three the one that is off is named, with its tensor."""
    results = run_replicas(drift, world_size=world_size, args=(tmp_path,))
    assert len({tuple(result) for result in results}) == 1
    (message,) = results[0]
    assert "drifted apart by step 6: 3.weight on " in message
    assert ("both replicas" if world_size == 2 else "rank 1 of 3") in message


def disagree(rank, world_size, folder):
    messages = {}

    def longer():
        task = noisy()
        return replace(task, train_data=torch.utils.data.Subset(task.train_data, range(90 - rank)))

    for name, config, task in (
        ("settings", make_config(folder, seed=rank), noisy),
        ("data", make_config(folder), longer),
    ):
        with pytest.raises(ConfigError) as caught:
            Trainer(config, task=task)
        messages[name] = str(caught.value)
        dist.barrier()
    return messages


def test_e6_replicas_that_mean_different_runs_refuse_to_start(tmp_path):
    """Other settings or other data on one replica: refused before the first step, on all, naming what differs."""
    first, second = run_replicas(disagree, world_size=2, args=(tmp_path,))
    assert first == second
    assert "do not agree on the settings" in first["settings"]
    assert "the number of samples, the data" in first["data"]
    assert not list(tmp_path.iterdir()), "nothing was written"


def answer_with_another_sum(rank, world_size, folder):
    """In step 4 one replica is in another reduction of the same shape, which gloo adds to the step's own."""
    send, lengths = step_module.send, []

    def send_or_mix(record, **parts):
        if record.step == 4 and rank == 1:
            return PendingSum(torch.ones(lengths[-1], dtype=torch.float64))
        pending = send(record, **parts)
        lengths.append(pending._vector.numel())
        return pending

    step_module.send = send_or_mix
    try:
        with pytest.raises(DesyncError) as caught:
            attempt(folder)
    finally:
        step_module.send = send
    return str(caught.value)


def test_e7_reductions_that_do_not_belong_together_are_an_error_and_no_mixed_value(tmp_path):
    """The tag of the step does not add up: both replicas stop and name the step, and nothing rests on the sum."""
    for message in run_replicas(answer_with_another_sum, world_size=2, args=(tmp_path,)):
        assert message.startswith("replicas disagree at step 4: step is 4 here, but 2.5 on average")
