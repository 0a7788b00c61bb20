"""Who reaches whom: a small listener on each rank that tells its clock, and calls to it that say why they fail."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import Self

import psutil

_CALL_S = 3.0  # a SYN that is lost once is sent again after one second
_QUIET_S = 0.2  # how long the listener waits before it looks whether it is to end
_TOKEN_BYTES = 16
_CLOCK = struct.Struct("!d")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call to another rank came to.

    Attributes:
        problem: why there was no answer, or nothing.
        round_trip_s: of the question and its answer.
        clock_offset_s: the other clock less this one's, right to half the round trip.
    """

    problem: str = ""
    round_trip_s: float = 0.0
    clock_offset_s: float = 0.0


class ClockListener:
    """Answers calls with this machine's time, from a thread of its own, while it is entered.

    It listens on one address and speaks only to who knows the token, so that a stranger learns nothing.

    Args:
        address: of the interface to listen on.
        token: 16 bytes that all ranks know.

    Raises:
        OSError: where the address is none of this machine.
    """

    def __init__(self, address: str, *, token: bytes) -> None:
        assert len(token) == _TOKEN_BYTES
        self._token = token
        self._socket = socket.create_server((address, 0), backlog=512)
        self._socket.settimeout(_QUIET_S)
        self._is_open = True
        self._thread = threading.Thread(target=self._serve, name="dptrain-doctor", daemon=True)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._socket.getsockname()[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while self._is_open:
            with contextlib.suppress(OSError):  # nobody came, or who came went
                caller, _ = self._socket.accept()
                with caller:
                    caller.settimeout(_CALL_S)
                    if _receive(caller, _TOKEN_BYTES) == self._token:
                        caller.sendall(_CLOCK.pack(time.time()))


def call(address: str, port: int, *, token: bytes, limit_s: float = _CALL_S) -> Answer:
    """Ask another rank's listener for its time."""
    try:
        with socket.create_connection((address, port), timeout=limit_s) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            began, began_s = time.time(), time.perf_counter()
            peer.sendall(token)
            remote_s = _CLOCK.unpack(_receive(peer, _CLOCK.size))[0]
            took_s = time.perf_counter() - began_s
    except (OSError, struct.error) as error:
        return Answer(problem=why(error))
    return Answer(round_trip_s=took_s, clock_offset_s=remote_s - (began + took_s / 2))


def why(error: BaseException) -> str:
    """Return in a few words what a failed connection points to."""
    if isinstance(error, socket.gaierror):
        return "its name is not known here"
    if isinstance(error, TimeoutError):
        return "no answer (a firewall, another network, or a wrong address)"
    if isinstance(error, ConnectionRefusedError):
        return "refused: nobody listens there"
    if isinstance(error, struct.error | ConnectionResetError):
        return "hung up without an answer"
    if getattr(error, "errno", None) in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "there is no route to it"
    return str(error)


def interface_towards(address: str, port: int) -> tuple[str, str] | None:
    """Return name and address of the interface by which this machine reaches an address; None where it has no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))  # sends nothing: only the routing table is asked
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in entries):
            return name, own
    return None


def is_own(address: str) -> bool:
    """Tell whether a name or address is one of this machine; a name that is not known is not."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(address, None)}
    except OSError:
        return False
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    return any(address in own or address.startswith("127.") for address in found)


def owner_of_port(port: int) -> str:
    """Return who listens on a port, as ` by python (pid 12)`; nothing where this user may not see that."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if (
                connection.status == psutil.CONN_LISTEN
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""


def _receive(peer: socket.socket, count: int) -> bytes:
    received = b""
    while len(received) < count and (part := peer.recv(count - len(received))):
        received += part
    return received
