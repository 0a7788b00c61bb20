"""Requests to stop: noted once, however often they are passed on, and gone when the run is."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from dptrain.train import preemption
from dptrain.train.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_nothing_else_happens(number):
    """It neither raises nor ends the process; passed on more than once it is still one request."""
    with StopRequest() as stop:
        assert not stop.requested
        for _ in range(3):
            signal.raise_signal(number)
        assert stop.requested


def test_the_handlers_are_those_from_before():
    """Afterwards Ctrl-C is what it was."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest():
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_that_cannot_have_signals_does_without():
    """Training in a thread (of a notebook, say) works; signals go where they went."""
    found = []

    def enter():
        with StopRequest() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_second_request_after_a_while_means_it():
    """Who asks again is not made to wait for a step that hangs: the process ends as the signal says."""
    program = f"""
import signal, time
from dptrain.train import preemption
preemption._REPEAT_S = 0.0
with preemption.StopRequest() as stop:
    signal.raise_signal({int(signal.SIGTERM)})
    time.sleep(0.01)
    signal.raise_signal({int(signal.SIGTERM)})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGTERM


def test_the_time_of_a_repeat_is_that_of_launchers():
    """A launcher passes a signal on within a second; a person takes longer to lose patience."""
    assert 1 < preemption._REPEAT_S < 10
