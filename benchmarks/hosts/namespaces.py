"""Hosts on one machine: network namespaces on a bridge, each with a torchrun of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PORT = 29400


def reason_to_skip() -> str:
    """Return why this machine has no network namespaces to offer; empty where it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` command"
    name = f"dpt{os.getpid() % 10000}x"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"the kernel refuses network namespaces: {made.stderr.strip()}"
    probe = subprocess.run(
        ["ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b"],
        capture_output=True,
        text=True,
        check=False,
    )
    subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"the kernel refuses virtual links: {probe.stderr.strip()}" if probe.returncode else ""


def _run(*command: object) -> None:
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


class Host:
    """A network namespace with an address, and the torchrun that is running in it.

    Args:
        network: that it belongs to.
        number: of the host, from 0.
    """

    def __init__(self, network: Network, number: int) -> None:
        self.network = network
        self.number = number
        self.name = f"{network.name}h{number}"
        self.address = f"10.77.{network.subnet}.{number + 1}"
        self.log = network.folder / f"host-{number}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0
        self._make()
        self._plug_in()
        self._inside("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self._inside("ip", "link", "set", "eth0", "up")
        self._inside("ip", "link", "set", "lo", "up")

    def _make(self) -> None:
        _run("ip", "netns", "add", self.name)

    def _plug_in(self) -> None:
        """Make `eth0` inside the namespace."""
        _run("ip", "link", "add", f"{self.name}v", "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _run("ip", "link", "set", f"{self.name}v", "master", self.network.bridge, "up")

    def command(self, *arguments: object, **environment: object) -> subprocess.Popen[bytes]:
        """Start a program in this namespace; it ends with `kill`, as torchrun does."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, arguments)],
                cwd=ROOT,
                env={
                    **_inherited(),
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "eth0",
                    **{name: str(value) for name, value in environment.items()},
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.process

    def _inside(self, *command: str) -> None:
        _run("ip", "netns", "exec", self.name, *command)

    def start(
        self,
        *arguments: object,
        nnodes: str,
        max_restarts: int = 20,
        run_id: str = "job",
        cwd: Path | None = None,
        **environment: object,
    ) -> None:
        """Start torchrun with one replica; host 0 serves the store."""
        launch = [
            "unshare", "--uts", "--kill-child", "sh", "-c", f'hostname host{self.number} && exec "$0" "$@"',
            sys.executable, "-m", "torch.distributed.run",
            "--nnodes", nnodes, "--nproc-per-node", "1", "--max-restarts", str(max_restarts),
            "--rdzv-backend", "c10d", "--rdzv-id", run_id,
            "--rdzv-endpoint", f"{self.network.hosts[0].address}:{PORT}",
            # As launch/torchrun.sh, which has the reasons.
            "--rdzv-conf", f"is_host={int(self.number == 0)},keep_alive_interval=3,last_call_timeout=5",
            "--local-addr", self.address,
            "-m", "dptrain", "train", *map(str, arguments),
        ]  # fmt: skip
        self.starts += 1
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *launch],
                cwd=cwd or ROOT,
                env={
                    **_inherited(),
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": "eth0",
                    # As launch/torchrun.sh: with a shared store a host that returns waits forever for an address.
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    **{name: str(value) for name, value in environment.items()},
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        """Return all processes of this host that live."""
        if self.process is None:
            return []
        with suppress(psutil.Error):
            return [p for p in [psutil.Process(self.process.pid), *_below(self.process.pid)] if p.is_running()]
        return []

    def replicas(self) -> list[psutil.Process]:
        """Return the process that trains here, if there is one."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if process.environ().get("RANK") is not None:
                    found.append(process)
        return found[:1]

    def kill(self) -> None:
        """Kill everything here at once, as a loss of power does; the kernel still closes its connections."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(timeout=30)

    def leave(self) -> None:
        """Ask torchrun to stop, as a scheduler does before it takes a host away."""
        for process in self.processes():
            with suppress(psutil.Error):
                if "torch.distributed.run" in process.cmdline() and "RANK" not in process.environ():
                    process.send_signal(signal.SIGTERM)

    def signal_replicas(self, number: int) -> None:
        """Send a signal to the processes that train here."""
        for process in self.replicas():
            with suppress(psutil.Error):
                process.send_signal(number)

    def cut(self) -> None:
        """Pull the plug: nothing comes or goes any more, and no notice is sent."""
        _run("ip", "link", "set", f"{self.name}v", "down")

    def join(self) -> None:
        """Put the plug back."""
        _run("ip", "link", "set", f"{self.name}v", "up")

    def shape(self, rate: str, *, queue: str = "50ms") -> None:
        """Let no more than a rate, such as 100mbit, out of this host; more than a queue holds is dropped."""
        self._inside(
            "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb", "latency", queue
        )

    def wait(self, timeout_s: float = 120) -> int:
        """Return the exit code of torchrun."""
        assert self.process is not None
        return self.process.wait(timeout=timeout_s)

    def text(self) -> str:
        """Return what was printed here."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def close(self) -> None:
        """Kill what runs here and remove the host."""
        self.kill()
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", f"{self.name}v"], capture_output=True, check=False)


def _inherited() -> dict[str, str]:
    # Compiled files are kept, as those of an installation are: compiling dptrain at each start takes a replica 1.8 s of
    # CPU time beside 6.1 s.
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


class Network:
    """A bridge, and the hosts on it.

    Args:
        folder: for what is printed.
        number: of hosts.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = Path(folder)
        self.subnet = os.getpid() % 250
        self.name = f"dp{os.getpid() % 100000}"
        self.bridge = f"{self.name}b"
        self.hosts: list[Host] = []
        _run("ip", "link", "add", self.bridge, "type", "bridge")
        _run("ip", "link", "set", self.bridge, "up")
        for index in range(number):
            self.hosts.append(self._host(index))

    def _host(self, number: int) -> Host:
        return Host(self, number)

    def close(self) -> None:
        """Remove hosts and bridge."""
        for host in self.hosts:
            host.close()
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)


@contextmanager
def network(folder: Path, number: int) -> Iterator[Network]:
    """Give hosts that are gone afterwards, with all that runs on them."""
    made = Network.__new__(Network)
    made.hosts, made.bridge = [], ""
    try:
        made.__init__(folder, number)  # type: ignore[misc] # by steps: what was made before an error is removed, too
        yield made
    finally:
        made.close()


def until(is_so: Callable[[], bool], *, timeout_s: float = 90.0, what: str | Callable[[], str] = "") -> float:
    """Wait until something is so; return the seconds that it took."""
    began_s = time.monotonic()
    while not is_so():
        assert time.monotonic() - began_s < timeout_s, what() if callable(what) else what
        time.sleep(0.05)
    return time.monotonic() - began_s
