"""Requests to stop or to save: noted once, at once, however often they are passed on, and gone when the run is."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dptrain.runtime import signals as preemption
from dptrain.runtime.signals import EXIT_HUNG, SignalHandler

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def wait_until(condition):
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def run(program):
    return subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_nothing_else_happens(number):
    """It neither raises nor ends the process; passed on more than once it is still one request."""
    with SignalHandler() as stop:
        assert not stop.requested
        for _ in range(3):
            signal.raise_signal(number)
        wait_until(lambda: stop.requested)
        assert not stop.take_save()


def test_a_request_to_save_is_taken_once_and_stops_nothing():
    """SIGUSR1 asks for a checkpoint; the run goes on."""
    with SignalHandler() as stop:
        signal.raise_signal(signal.SIGUSR1)
        wait_until(lambda: stop._save)
        assert (stop.take_save(), stop.take_save(), stop.requested) == (True, False, False)


def test_a_signal_is_noted_while_the_main_thread_is_blocked():
    """A handler of Python would wait until the call returns; the request is there long before."""
    program = """
import ctypes, os, signal, threading, time
from dptrain.runtime.signals import SignalHandler
with SignalHandler() as stop:
    began = time.monotonic()
    def watch():
        while not stop.requested:
            time.sleep(0.01)
        print("noted after", time.monotonic() - began)
    thread = threading.Thread(target=watch)
    thread.start()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    end = time.monotonic() + 3
    while time.monotonic() < end:  # as a collective does, which a signal interrupts and which then goes on
        ctypes.CDLL(None).usleep(900_000)
    thread.join()
"""
    ended = run(program)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout.split()[-1]) < 1


def test_the_handlers_are_those_from_before():
    """Afterwards Ctrl-C is what it was, and the thread and its pipe are gone."""
    before = [signal.getsignal(number) for number in HANDLED]
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with SignalHandler():
            assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before
    wait_until(lambda: not any(thread.name == "signals" for thread in threading.enumerate()))
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert signal.set_wakeup_fd(-1) == -1


def test_a_thread_that_cannot_have_signals_does_without():
    """Training in a thread (of a notebook, say) works; signals go where they went."""
    found = []

    def enter():
        with SignalHandler() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_second_request_after_a_while_means_it():
    """Who asks again is not made to wait for a step that hangs: the process ends as the signal says."""
    program = f"""
import signal, time
from dptrain.runtime import signals as preemption
preemption._REPEAT_S = 0.0
with preemption.SignalHandler() as stop:
    for _ in range(2):
        signal.raise_signal({int(signal.SIGTERM)})
        time.sleep(0.2)
    time.sleep(20)
"""
    assert run(program).returncode == 128 + signal.SIGTERM


def test_who_cannot_stop_within_the_grace_says_where_it_stands_and_ends():
    """A replica that waits for a peer for ever ends by itself, with its stack and a code of its own."""
    program = f"""
import signal, time
from dptrain.runtime.signals import SignalHandler
def wait_for_a_peer():
    time.sleep(30)
with SignalHandler(grace_s=0.3):
    signal.raise_signal({int(signal.SIGTERM)})
    wait_for_a_peer()
"""
    ended = run(program)
    assert ended.returncode == EXIT_HUNG
    assert "could not within 0.3 s" in ended.stderr
    assert "in wait_for_a_peer" in ended.stderr


def test_the_time_of_a_repeat_is_that_of_launchers():
    """A launcher passes a signal on within a second; a person takes longer to lose patience."""
    assert 1 < preemption._REPEAT_S < 10
