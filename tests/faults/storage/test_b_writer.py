"""Section B, in the background: a save under way is kept or gone as a whole, and training does not wait for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest

from dptrain.checkpoint import store as module
from dptrain.checkpoint.async_writer import AsyncWriter
from dptrain.checkpoint.store import load_newest
from tests.checkpoints import STATE, assert_holds, content, names, save
from tests.faults.storage.forked import exit_code, forked


class SlowDisk:
    """Lets a write through only when it is told to, and knows how many there were at once."""

    def __init__(self, monkeypatch):
        self.begun, self.release, self.num_writers = threading.Event(), threading.Event(), []
        self._writers, self._real = 0, module.save_checkpoint
        monkeypatch.setattr("dptrain.checkpoint.async_writer.save_checkpoint", self._save)

    def _save(self, *arguments, **options):
        self._writers += 1
        self.num_writers.append(self._writers)
        self.begun.set()
        assert self.release.wait(60)
        self._real(*arguments, **options)
        self._writers -= 1


def test_b13_a_slow_disk_does_not_stall_training(tmp_path, monkeypatch):
    """While one save is under way every other is skipped and counted; training pays for copies alone."""
    disk = SlowDisk(monkeypatch)
    with AsyncWriter(tmp_path) as writer:
        began = time.monotonic()
        assert writer.save(step=1, tensors=content(1), state={**STATE, "step": 1})
        assert disk.begun.wait(60)
        assert [writer.save(step=step, tensors=content(step), state={}) for step in (2, 3)] == [False, False]
        assert time.monotonic() - began < 2, "the disk is held until `release`, and nothing waited for it"
        assert (writer.status().committed_step, writer.status().skipped) == (0, 2)
        disk.release.set()
        assert writer.wait()
        assert (writer.status().committed_step, writer.status().skipped) == (1, 2)
        assert writer.save(step=4, tensors=content(4), state={})
    assert disk.num_writers == [1, 1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000000001", "step-000000000004"]


def end_with(how):
    if how == "exit":
        sys.exit(3)
    if how == "error":
        raise ArithmeticError
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", ["return", "exit", "error", "interrupt"])
def test_b14_a_save_under_way_is_waited_for_however_the_process_ends(tmp_path, how):
    """Neither an exit nor an exception cuts it short, also where nobody closes the writer."""
    save(tmp_path, 1)

    def body():
        real = module.save_file
        module.save_file = lambda *arguments: (time.sleep(0.2), real(*arguments))
        AsyncWriter(tmp_path).save(step=2, tensors=content(2), state={**STATE, "step": 2})
        end_with(how)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    while load_newest(tmp_path).step == 1 and process.is_alive():
        assert load_newest(tmp_path).passed_over == (), "what is not committed is not there"
        time.sleep(0.01)
    process.join()
    assert process.exitcode == {"return": 0, "exit": 3}.get(how, 1)
    assert_holds(load_newest(tmp_path), 2)


def test_b14_a_save_under_way_vanishes_with_a_process_that_is_ended_at_once(tmp_path):
    """SIGTERM without a handler: the checkpoint before is the newest, and the next save clears up."""
    save(tmp_path, 1)

    def body():
        module.save_file = lambda *_: end_with("SIGTERM")
        AsyncWriter(tmp_path).save(step=2, tensors=content(2), state={})
        time.sleep(60)

    assert exit_code(forked(body)) == -signal.SIGTERM
    assert_holds(load_newest(tmp_path), 1)
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000000000001", "step-000000000002"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_b17_a_state_that_is_not_finite_displaces_no_healthy_checkpoint(tmp_path, number):
    """It is refused by name and counted as a failed save, as often as it comes; the first finite one counts again."""
    with AsyncWriter(tmp_path, keep=1) as writer:
        writer.save(step=1, tensors=content(1), state={**STATE, "step": 1})
        for num_failed, step in enumerate((2, 3, 4), start=1):
            writer.wait()
            broken = content(step)
            broken["optimizer"]["exp_avg/w"][3, 1] = number
            writer.save(step=step, tensors=broken, state={})
            writer.wait()
            assert writer.status().failed == num_failed
            assert writer.status().committed_step == 1
            assert "not finite: optimizer/exp_avg/w holds" in writer.status().error
        assert_holds(load_newest(tmp_path), 1)
        writer.save(step=5, tensors=content(5), state={})
        writer.wait()
        assert (writer.status().failed, writer.status().committed_step) == (0, 5)
    assert names(tmp_path) == ["step-000000000005"]
