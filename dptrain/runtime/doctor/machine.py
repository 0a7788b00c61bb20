"""What one rank's machine has: devices, versions, memory, limits, interfaces; read here, judged in verdicts.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import resource
import shutil
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist

from dptrain import version

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - its size is read, nothing is written there


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one rank found on its machine.

    Attributes:
        rank, local_rank, local_world_size: the place of the rank.
        host: the machine's name.
        host_id: the same for all ranks that share an operating system and its network, and for no others.
        versions: of what must be the same on all ranks, by name.
        backends: process-group backends that torch has here.
        devices: names of the GPUs that torch sees.
        memory_bytes: of each GPU, or nothing.
        cuda_build: the CUDA release that torch was built for, or nothing.
        driver_files: what shows that the machine has NVIDIA GPUs, whether torch sees them or not.
        visible_devices: the variable CUDA_VISIBLE_DEVICES, or None.
        shm_bytes, shm_free_bytes: size of /dev/shm; None where there is none.
        cpus: cores that this process may use.
        threads: that torch uses.
        open_files, locked_bytes: soft limits; -1 is no limit.
        has_infiniband: whether there are InfiniBand or RoCE adapters.
        interfaces: IPv4 address of each network interface.
        gloo_interface, nccl_interface: the variables GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or None.
        address: under which other ranks will reach this one.
    """

    rank: int
    local_rank: int
    local_world_size: int
    host: str
    host_id: str
    versions: dict[str, str]
    backends: list[str]
    devices: list[str]
    memory_bytes: list[int]
    cuda_build: str
    driver_files: list[str]
    visible_devices: str | None
    shm_bytes: int | None
    shm_free_bytes: int | None
    cpus: int
    threads: int
    open_files: int
    locked_bytes: int
    has_infiniband: bool
    interfaces: dict[str, str]
    gloo_interface: str | None
    nccl_interface: str | None
    address: str

    def as_record(self) -> dict[str, Any]:
        """Return the facts as JSON has them."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the facts that `as_record` was taken from."""
        return cls(**record)


def read_machine(*, rank: int, local_rank: int, local_world_size: int) -> Machine:
    """Read this process's machine; makes no CUDA context and asks no other rank."""
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shm = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    interfaces = _interfaces()
    return Machine(
        rank=rank,
        local_rank=local_rank,
        local_world_size=local_world_size,
        host=socket.gethostname(),
        host_id=_host_id(),
        versions=_versions(),
        backends=[name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available")()],
        devices=[device.name for device in devices],
        memory_bytes=[device.total_memory for device in devices],
        cuda_build=torch.version.cuda or "",
        driver_files=[str(path) for path in _driver_files()],
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        shm_bytes=shm.total if shm else None,
        shm_free_bytes=shm.free if shm else None,
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
        locked_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        interfaces=interfaces,
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME") or None,
        nccl_interface=os.environ.get("NCCL_SOCKET_IFNAME") or None,
        address=_address(interfaces),
    )


def wants_gpu(device: str) -> bool:
    """Return whether a run on `device` ("auto", "cuda" or "cpu") is to use GPUs: auto does where the host has some."""
    return device == "cuda" or (device == "auto" and (torch.cuda.is_available() or bool(_driver_files())))


def _versions() -> dict[str, str]:
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "dptrain": version.__version__,
        "the code of dptrain": _code_digest(),
        "CUDA": torch.version.cuda or "none",
        "NCCL": _nccl_version(),
    }


def _nccl_version() -> str:
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return "none"
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call] # not run on a GPU


def _code_digest() -> str:
    """Return a digest of the package's sources: two checkouts may bear one version."""
    package = Path(version.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _host_id() -> str:
    """Tell machines and containers apart that bear one name: a kernel's start has an id, a network a number."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    with contextlib.suppress(OSError):
        return f"{boot.read_text(encoding='ascii').strip()}-{network.stat().st_ino}"
    return socket.gethostname()


def _driver_files() -> list[Path]:
    # nvidiactl exists also where the container was given no GPU
    return sorted(path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[len("nvidia") :].isdigit())


def _soft_limit(which: int) -> int:
    soft, _ = resource.getrlimit(which)
    return -1 if soft == resource.RLIM_INFINITY else soft


def _interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface that is up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in up
    }


def _address(interfaces: Mapping[str, str]) -> str:
    """Return the address that gloo will give to the others: of the interface asked for, else of the host's name."""
    if wanted := os.environ.get("GLOO_SOCKET_IFNAME"):
        return interfaces.get(wanted.split(",")[0], "")
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"
    return address if address in interfaces.values() or address.startswith("127.") else "127.0.0.1"
