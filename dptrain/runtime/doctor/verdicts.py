"""What is wrong with the machines of a run: findings from facts that were read before; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from dptrain.runtime.doctor.finding import Finding, Status, ranks_text
from dptrain.runtime.doctor.machine import Machine

Key = TypeVar("Key", bound=Hashable)

_GIB = 2**30
_SHM = "/dev/shm"  # noqa: S108 - the name of a check, no file
_LEAST_SHM_BYTES = _GIB  # Docker's default is 64 MiB; four workers with two batches of 16 MiB ahead need 128 MiB
_LEAST_OPEN_FILES = 4096  # a rank holds a socket per peer and per worker; the usual limit of 1,024 is met at 500 ranks
_LEAST_LOCKED_BYTES = 64 * 2**20  # InfiniBand registers buffers; below it NCCL fails with "memory registration"


def judge(machines: Sequence[Machine], *, wants_gpu: bool) -> list[Finding]:
    """Return the findings on all machines together, one or more for each check.

    Args:
        machines: of the ranks that came, in the order of their ranks.
        wants_gpu: whether the run is to use GPUs, so that a rank without one is a failure.
    """
    return [
        *_devices(machines, wants_gpu=wants_gpu),
        *_versions(machines),
        *_interfaces(machines),
        _shared_memory(machines),
        *_limits(machines),
        _threads(machines),
    ]


def why_no_gpu(machine: Machine) -> tuple[str, str]:
    """Return why torch sees no GPU on a machine, and the remedy."""
    if machine.visible_devices is not None and machine.visible_devices.strip() in ("", "-1", "NoDevFiles"):
        return (
            f"CUDA_VISIBLE_DEVICES is {machine.visible_devices!r}, which hides all GPUs",
            "unset CUDA_VISIBLE_DEVICES, or ask the scheduler for GPUs (SLURM: --gpus-per-node)",
        )
    if not machine.cuda_build:
        return (
            f"torch {machine.versions['torch']} is built for CPUs alone",
            "install a CUDA build of torch",
        )
    if not machine.driver_files:
        return (
            "there is no NVIDIA device file in /dev",
            "give the container its GPUs (Docker: --gpus all; Kubernetes: limits nvidia.com/gpu), or load the driver",
        )
    return (
        f"the driver does not serve CUDA {machine.cuda_build}, for which torch is built",
        "see what nvidia-smi says: update the driver, or install a torch that is built for an older CUDA",
    )


def _devices(machines: Sequence[Machine], *, wants_gpu: bool) -> list[Finding]:
    with_gpu = [machine for machine in machines if machine.devices]
    without = [machine for machine in machines if not machine.devices]
    if not with_gpu and not wants_gpu:
        return [Finding(check="devices", text=f"no GPU: {_ranks(machines)} on CPUs ({machines[0].cpus} cores)")]
    findings = []
    if without:
        for (cause, remedy), ranks in _groups(without, why_no_gpu):
            text = f"no GPU visible to {ranks_text(ranks)}: {cause}"
            findings.append(Finding(check="devices", status=Status.FAILURE, text=text, remedy=remedy))
    crowded = [machine for machine in with_gpu if machine.local_rank >= len(machine.devices)]
    if crowded:
        text = (
            f"{ranks_text(machine.rank for machine in crowded)} has no GPU of its own: "
            f"{crowded[0].local_world_size} ranks on a host with {len(crowded[0].devices)}"
        )
        remedy = "start at most one rank per GPU (NPROC, --nproc-per-node)"
        findings.append(Finding(check="devices", status=Status.FAILURE, text=text, remedy=remedy))
    if findings:
        return findings
    kinds = _groups(with_gpu, lambda machine: machine.devices[machine.local_rank])
    text = "; ".join(f"{len(ranks)} × {name}" for name, ranks in kinds)
    if len(kinds) > 1:
        remedy = "the slowest GPU sets the pace of all: choose nodes with one kind"
        return [Finding(check="devices", status=Status.WARNING, text=f"different GPUs: {text}", remedy=remedy)]
    return [Finding(check="devices", text=text), *_backends(with_gpu)]


def _backends(machines: Sequence[Machine]) -> list[Finding]:
    lacking = [machine.rank for machine in machines if "nccl" not in machine.backends]
    if not lacking:
        return []
    text = f"torch has no NCCL for {ranks_text(lacking)}"
    remedy = "install a torch with NCCL (the Linux builds for CUDA have it)"
    return [Finding(check="backends", status=Status.FAILURE, text=text, remedy=remedy)]


def _versions(machines: Sequence[Machine]) -> list[Finding]:
    findings = []
    for name in machines[0].versions:
        found = _groups(machines, lambda machine, name=name: machine.versions[name])  # type: ignore[misc]
        if len(found) > 1:
            text = f"{name} differs: " + "; ".join(f"{value} on {_where(machines, ranks)}" for value, ranks in found)
            remedy = "install the same environment on all hosts, or one on storage that they share"
            findings.append(Finding(check="versions", status=Status.FAILURE, text=text, remedy=remedy))
    if findings:
        return findings
    same = machines[0].versions
    text = ", ".join(f"{name} {same[name]}" for name in ("Python", "torch", "numpy", "dptrain", "CUDA"))
    return [Finding(check="versions", text=text, figures=dict(same))]


def _interfaces(machines: Sequence[Machine]) -> list[Finding]:
    findings = [
        finding
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
        for finding in _wrong_interface(machines, variable)
    ]
    several_hosts = len({machine.host_id for machine in machines}) > 1
    deaf = [machine for machine in machines if machine.address.startswith("127.")] if several_hosts else []
    if deaf and not findings:
        machine = deaf[0]
        asked = f"GLOO_SOCKET_IFNAME={machine.gloo_interface}" if machine.gloo_interface else "the name of the host"
        others = [name for name, address in machine.interfaces.items() if not address.startswith("127.")]
        text = (
            f"{_where(machines, [m.rank for m in deaf])} is announced to other hosts as {machine.address}, a loopback "
            f"address, by {asked}"
        )
        remedy = f"set GLOO_SOCKET_IFNAME to the interface that reaches the other hosts ({' or '.join(others)})"
        findings.append(Finding(check="interface", status=Status.FAILURE, text=text, remedy=remedy))
    if findings:
        return findings
    addresses = sorted({machine.address for machine in machines})
    shown = ", ".join(addresses[:4]) + (f" and {len(addresses) - 4} more" if len(addresses) > 4 else "")  # noqa: PLR2004
    return [Finding(check="interface", text=f"ranks are announced as {shown}")]


def _wrong_interface(machines: Sequence[Machine], variable: str) -> list[Finding]:
    def wanted(machine: Machine) -> str | None:
        return machine.gloo_interface if variable == "GLOO_SOCKET_IFNAME" else machine.nccl_interface

    wrong = [machine for machine in machines if not _exists(wanted(machine), machine, variable)]
    if not wrong:
        return []
    there = ", ".join(f"{name} ({address})" for name, address in wrong[0].interfaces.items())
    where = _where(machines, [machine.rank for machine in wrong])
    text = f"{variable} is {wanted(wrong[0])!r}, but {where} has only {there}"
    remedy = f"set {variable} to the interface that reaches the other hosts, or unset it"
    return [Finding(check="interface", status=Status.FAILURE, text=text, remedy=remedy)]


def _exists(wanted: str | None, machine: Machine, variable: str) -> bool:
    """Tell whether an interface that a variable asks for is there; NCCL's may be prefixes, `=exact` and `^not`."""
    if not wanted or wanted.startswith("^"):
        return True
    names = wanted.removeprefix("=").split(",")
    if variable == "GLOO_SOCKET_IFNAME" or wanted.startswith("="):
        return any(name in machine.interfaces for name in names)
    return any(interface.startswith(name) for name in names for interface in machine.interfaces)


def _shared_memory(machines: Sequence[Machine]) -> Finding:
    sizes = {machine.rank: machine.shm_bytes for machine in machines if machine.shm_bytes is not None}
    if not sizes:
        return Finding(check=_SHM, text="none on this system")
    least = min(sizes, key=lambda rank: sizes[rank])
    free = min(machine.shm_free_bytes or 0 for machine in machines if machine.rank in sizes)
    figures = {"size_bytes": sizes[least], "free_bytes": free}
    text = f"{sizes[least] / _GIB:.3g} GiB on the host of rank {least}, {free / _GIB:.3g} GiB free"
    if min(sizes[least], free) >= _LEAST_SHM_BYTES:
        return Finding(check=_SHM, text=text, figures=figures)
    remedy = (
        "enlarge it (Docker: --shm-size 8g; Kubernetes: an emptyDir with medium Memory at /dev/shm) or train with "
        "--num-workers 0"
    )
    return Finding(check=_SHM, status=Status.WARNING, text=f"small: {text}", remedy=remedy, figures=figures)


def _limits(machines: Sequence[Machine]) -> list[Finding]:
    findings = []
    few = [machine for machine in machines if 0 <= machine.open_files < _LEAST_OPEN_FILES]
    if few:
        least = min(machine.open_files for machine in few)
        text = f"at most {least} open files for {_where(machines, [machine.rank for machine in few])}"
        findings.append(
            Finding(
                check="limits", status=Status.WARNING, text=text, remedy="raise it before the start: ulimit -n 65536"
            )
        )
    pinned = [
        machine
        for machine in machines
        if machine.has_infiniband and 0 <= machine.locked_bytes < _LEAST_LOCKED_BYTES and machine.devices
    ]
    if pinned:
        text = (
            f"InfiniBand, but little memory may be locked by {_where(machines, [machine.rank for machine in pinned])}"
        )
        remedy = "raise it before the start: ulimit -l unlimited (Docker: --ulimit memlock=-1)"
        findings.append(Finding(check="limits", status=Status.FAILURE, text=text, remedy=remedy))
    least_files = min((m.open_files for m in machines if m.open_files >= 0), default=-1)
    shown = "unlimited" if least_files < 0 else f"{least_files:,}"
    return findings or [Finding(check="limits", text=f"open files {shown}", figures={"open_files": least_files})]


def _threads(machines: Sequence[Machine]) -> Finding:
    crowded = [
        machine
        for machine in machines
        if machine.threads > 1 and machine.threads * machine.local_world_size > machine.cpus
    ]
    if not crowded:
        return Finding(check="threads", text=f"{machines[0].threads} of {machines[0].cpus} cores for each rank")
    machine = crowded[0]
    text = (
        f"{machine.local_world_size} ranks × {machine.threads} threads on {machine.cpus} cores: "
        f"{_where(machines, [m.rank for m in crowded])} will wait for cores"
    )
    remedy = f"export OMP_NUM_THREADS={max(1, machine.cpus // machine.local_world_size)}"
    return Finding(check="threads", status=Status.WARNING, text=text, remedy=remedy)


def _groups(machines: Sequence[Machine], key: Callable[[Machine], Key]) -> list[tuple[Key, list[int]]]:
    """Return the ranks by what `key` says of their machines, the most frequent first."""
    found: dict[Key, list[int]] = defaultdict(list)
    for machine in machines:
        found[key(machine)].append(machine.rank)
    return sorted(found.items(), key=lambda group: -len(group[1]))


def _ranks(machines: Sequence[Machine]) -> str:
    return ranks_text(machine.rank for machine in machines)


def _where(machines: Sequence[Machine], ranks: Sequence[int]) -> str:
    """Return ranks with their host, where that is one of several."""
    hosts = {machine.host for machine in machines if machine.rank in ranks}
    is_one_of_several = len(hosts) == 1 and len({machine.host_id for machine in machines}) > 1
    return f"{ranks_text(ranks)} (host {hosts.pop()})" if is_one_of_several else ranks_text(ranks)
