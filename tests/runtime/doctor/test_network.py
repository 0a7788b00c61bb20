"""Calls between ranks on loopback: clocks, and a reason for each way in which a call may fail."""

from __future__ import annotations

import socket
import threading

import pytest

from dptrain.runtime.doctor import network
from dptrain.runtime.doctor.network import ClockListener, call, interface_towards, is_own, owner_of_port

TOKEN = b"0123456789abcdef"


def test_a_call_tells_the_clock():
    """Between two threads of one machine the clocks agree to within the call's own round trip."""
    with ClockListener("127.0.0.1", token=TOKEN) as listener:
        answer = call("127.0.0.1", listener.port, token=TOKEN)
    assert answer.problem == ""
    assert abs(answer.clock_offset_s) <= answer.round_trip_s
    assert "127.0.0.1" not in answer.problem


def test_a_clock_that_is_ahead_is_measured(monkeypatch):
    """An hour on the other clock is an hour in the answer."""
    with ClockListener("127.0.0.1", token=TOKEN) as listener:
        real, caller = network.time.time, threading.get_ident()
        monkeypatch.setattr(network.time, "time", lambda: real() + 3600 * (threading.get_ident() != caller))
        answer = call("127.0.0.1", listener.port, token=TOKEN)
    assert answer.clock_offset_s == pytest.approx(3600, abs=1 + answer.round_trip_s)


def test_a_stranger_gets_no_answer():
    """Who does not know the token is hung up on, and the listener serves on."""
    with ClockListener("127.0.0.1", token=TOKEN) as listener:
        assert call("127.0.0.1", listener.port, token=b"x" * 16).problem == "hung up without an answer"
        assert call("127.0.0.1", listener.port, token=TOKEN).problem == ""


@pytest.mark.parametrize(
    ("address", "problem"),
    [("127.0.0.1", "refused: nobody listens there"), ("no.such.name.invalid", "its name is not known here")],
)
def test_a_failed_call_says_why(address, problem):
    """A port where nobody listens and a name that nobody knows are distinguished."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert call(address, port, token=TOKEN).problem == problem


def test_who_never_answers_is_given_up():
    """A peer that takes the call and stays silent costs the time limit, and no more."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        answer = call("127.0.0.1", silent.getsockname()[1], token=TOKEN, limit_s=0.2)
    assert answer.problem.startswith("no answer")


def test_the_way_to_an_address_is_found():
    """Loopback is reached by a loopback interface; the machine knows its own addresses and no others."""
    name, address = interface_towards("127.0.0.1", 1)
    assert name.startswith("lo")
    assert address == "127.0.0.1"
    assert is_own("127.0.0.1")
    assert is_own("localhost")
    assert not is_own("203.0.113.7")
    assert not is_own("no.such.name.invalid")


def test_who_uses_a_port_is_named():
    """This process is found behind the port that it listens on."""
    with socket.create_server(("127.0.0.1", 0)) as mine:
        assert f"(pid {network.psutil.Process().pid})" in owner_of_port(mine.getsockname()[1])
