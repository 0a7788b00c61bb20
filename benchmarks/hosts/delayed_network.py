"""Hosts whose packets arrive late, for kernels without netem: each host's link is a tunnel, and a process delays it."""
# python -m benchmarks.delayed_network DELAY_S NAMESPACE …: the forwarder, which runs until it is killed

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.hosts.namespaces import ROOT, Host, Network, until

_MAKE_TUNNEL = 0x400454CA  # TUNSETIFF
_PACKETS_OF_IP = 0x1001  # IFF_TUN without a header of its own
_LARGEST_PACKET = 9000
_CLONE_NETWORK = 0x40000000  # CLONE_NEWNET


class _TunnelHost(Host):
    """A host whose link is made by the forwarder."""

    def _make(self) -> None:
        """Do nothing: the forwarder needs the namespaces of all."""

    def _plug_in(self) -> None:
        """Do nothing: the forwarder has made `eth0`."""


class DelayedNetwork(Network):
    """Hosts without a bridge: a process takes each packet from one tunnel, and gives it to another one later.

    Args:
        folder: for what is printed.
        number: of hosts.
        delay_s: from one host to another, one way.
    """

    def __init__(self, folder: Path, number: int, *, delay_s: float) -> None:
        self._forwarder: subprocess.Popen[bytes] | None = None
        self._delay_s = delay_s
        self._number = number
        super().__init__(folder, number)

    def _host(self, number: int) -> Host:
        if self._forwarder is None:
            names = [f"{self.name}h{index}" for index in range(self._number)]
            for name in names:
                subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
            self._forwarder = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.hosts.delayed_network", str(self._delay_s), *names], cwd=ROOT
            )
            for name in names:
                until(partial(_has_tunnel, name), what="no tunnel")
        return _TunnelHost(self, number)

    def close(self) -> None:
        """Remove hosts and forwarder."""
        super().close()
        if self._forwarder is not None:
            self._forwarder.kill()
            self._forwarder.wait()


def _has_tunnel(namespace: str) -> bool:
    look = ["ip", "netns", "exec", namespace, "ip", "link", "show", "eth0"]
    return not subprocess.run(look, capture_output=True, check=False).returncode


@contextmanager
def delayed_network(folder: Path, number: int, *, delay_s: float) -> Iterator[DelayedNetwork]:
    """Give hosts that are gone afterwards, with all that runs on them."""
    made = DelayedNetwork.__new__(DelayedNetwork)
    made.hosts, made.bridge, made._forwarder = [], "", None  # noqa: SLF001 - by steps, as `network`
    try:
        made.__init__(folder, number, delay_s=delay_s)  # type: ignore[misc] # as above
        yield made
    finally:
        made.close()


def forward(delay_s: float, namespaces: list[str]) -> None:
    """Make a tunnel in each namespace, and pass packets on by the last byte of their address."""
    tunnels = [_tunnel(name) for name in namespaces]
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        timeout_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select(tunnels, [], [], timeout_s)
        now_s = time.monotonic()
        for tunnel in ready:
            packet = os.read(tunnel, _LARGEST_PACKET + 100)
            if packet[0] >> 4 == 4 and 0 < packet[19] <= len(tunnels):
                waiting.append((now_s + delay_s, tunnels[packet[19] - 1], packet))
        while waiting and waiting[0][0] <= now_s:
            _, tunnel, packet = waiting.popleft()
            os.write(tunnel, packet)


def _tunnel(namespace: str) -> int:
    """Return a tunnel whose other end is `eth0` of a namespace."""
    library = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if library.setns(there, _CLONE_NETWORK):
            raise OSError(ctypes.get_errno(), "setns")
        tunnel = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tunnel, _MAKE_TUNNEL, struct.pack("16sH", b"eth0", _PACKETS_OF_IP))
        subprocess.run(["ip", "link", "set", "eth0", "mtu", str(_LARGEST_PACKET)], check=True)
    finally:
        library.setns(own, _CLONE_NETWORK)
        os.close(own)
        os.close(there)
    return tunnel


if __name__ == "__main__":
    forward(float(sys.argv[1]), sys.argv[2:])
