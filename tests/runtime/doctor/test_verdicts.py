"""Each fault of a machine, tried on its facts alone: it is found, its cause is named, and there is a remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptrain.runtime.doctor.finding import Status
from dptrain.runtime.doctor.machine import Machine
from dptrain.runtime.doctor.verdicts import judge

GIB = 2**30
SHM = "/dev/shm"  # noqa: S108 - the name of a check
GPU = Machine(
    rank=0,
    local_rank=0,
    local_world_size=2,
    host="a",
    host_id="a",
    versions={"Python": "3.11", "torch": "2.13.0", "numpy": "2.4", "dptrain": "1", "CUDA": "13.0"},
    backends=["gloo", "nccl"],
    devices=["H100", "H100"],
    memory_bytes=[80 * GIB, 80 * GIB],
    cuda_build="13.0",
    driver_files=["/dev/nvidia0", "/dev/nvidia1"],
    visible_devices=None,
    shm_bytes=8 * GIB,
    shm_free_bytes=8 * GIB,
    cpus=16,
    threads=8,
    open_files=65536,
    locked_bytes=-1,
    has_infiniband=True,
    interfaces={"lo": "127.0.0.1", "eth0": "10.0.0.1"},
    gloo_interface=None,
    nccl_interface=None,
    address="10.0.0.1",
)
CPU = replace(GPU, devices=[], memory_bytes=[], driver_files=[], has_infiniband=False)


def two_hosts(machine=GPU, **of_second):
    """Four ranks on two hosts; the second host differs by what is given."""
    second = {"host": "b", "host_id": "b", "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.2"}, "address": "10.0.0.2"}
    first = [replace(machine, rank=rank, local_rank=rank) for rank in range(2)]
    return first + [replace(machine, rank=2 + i, local_rank=i, **{**second, **of_second}) for i in range(2)]


def problems(machines, *, wants_gpu=True):
    """The findings that are no good news, with their check and status."""
    return [finding for finding in judge(machines, wants_gpu=wants_gpu) if finding.status is not Status.OK]


def test_machines_without_a_fault_have_no_problem():
    """Four equal GPUs on two hosts pass, and so do CPUs where no GPU is wanted."""
    assert problems(two_hosts()) == []
    assert problems(two_hosts(CPU), wants_gpu=False) == []
    assert {finding.check for finding in judge(two_hosts(), wants_gpu=True)} == {
        "devices",
        "versions",
        "interface",
        SHM,
        "limits",
        "threads",
    }


@pytest.mark.parametrize(
    ("change", "cause", "remedy"),
    [
        ({"visible_devices": ""}, "CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES"),
        ({"visible_devices": "-1"}, "CUDA_VISIBLE_DEVICES is '-1'", "--gpus-per-node"),
        ({"cuda_build": ""}, "torch 2.13.0 is built for CPUs alone", "install a CUDA build of torch"),
        ({"driver_files": []}, "no NVIDIA device file in /dev", "--gpus all"),
        ({}, "the driver does not serve CUDA 13.0", "nvidia-smi"),
    ],
)
def test_a_host_whose_gpus_are_not_visible_says_why(change, cause, remedy):
    """Each reason why torch sees no GPU has its own sentence and remedy, with the ranks and the host."""
    (finding,) = problems(two_hosts(devices=[], memory_bytes=[], **change))
    assert finding.status is Status.FAILURE
    assert finding.text.startswith("no GPU visible to ranks 2–3: ")
    assert cause in finding.text
    assert remedy in finding.remedy


def test_more_ranks_than_gpus_are_found():
    """A rank whose number on its host has no GPU is named."""
    (finding,) = problems(two_hosts(devices=["H100"]))
    assert finding.text == "rank 3 has no GPU of its own: 2 ranks on a host with 1"


def test_unequal_gpus_are_a_warning():
    """A slower kind of GPU in the run is reported, and is no failure."""
    (finding,) = problems(two_hosts(devices=["A100", "A100"]))
    assert finding.status is Status.WARNING
    assert finding.text == "different GPUs: 2 × H100; 2 × A100"


@pytest.mark.parametrize("name", ["Python", "torch", "dptrain"])
def test_versions_that_differ_are_named_with_their_hosts(name):
    """The two versions are named, and who has which."""
    (finding,) = problems(two_hosts(versions={**GPU.versions, name: "0.0"}))
    assert finding.status is Status.FAILURE
    assert finding.text == f"{name} differs: {GPU.versions[name]} on ranks 0–1 (host a); 0.0 on ranks 2–3 (host b)"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"gloo_interface": "eth1", "address": ""}, "GLOO_SOCKET_IFNAME is 'eth1', but ranks 2–3 (host b) has only lo"),
        ({"nccl_interface": "ib"}, "NCCL_SOCKET_IFNAME is 'ib'"),
        ({"nccl_interface": "=eth"}, "NCCL_SOCKET_IFNAME is '=eth'"),
        ({"gloo_interface": "lo", "address": "127.0.0.1"}, "by GLOO_SOCKET_IFNAME=lo"),
        (
            {"address": "127.0.1.1"},
            "to other hosts as 127.0.1.1, a loopback address, by the name of the host",
        ),
    ],
)
def test_a_wrong_interface_is_named(change, fault):
    """An interface that is not there, and one that other hosts cannot reach, are each a failure with its variable."""
    (finding,) = problems(two_hosts(**change))
    assert finding.check == "interface"
    assert fault in finding.text
    assert "eth0" in finding.text + finding.remedy


@pytest.mark.parametrize("wanted", ["eth", "=eth0", "^lo", "ib,eth"])
def test_interfaces_of_nccl_may_be_prefixes(wanted):
    """NCCL's own notation is understood: prefixes, exact names, exclusions."""
    assert problems(two_hosts(nccl_interface=wanted)) == []


def test_loopback_is_right_on_one_host():
    """Ranks of one host may meet on loopback."""
    machines = [replace(CPU, rank=rank, address="127.0.0.1", gloo_interface="lo") for rank in range(2)]
    assert problems(machines, wants_gpu=False) == []


@pytest.mark.parametrize(
    ("change", "check", "status", "remedy"),
    [
        ({"shm_bytes": 64 * 2**20}, SHM, Status.WARNING, "--shm-size 8g"),
        ({"shm_free_bytes": 2**20}, SHM, Status.WARNING, "--num-workers 0"),
        ({"open_files": 1024}, "limits", Status.WARNING, "ulimit -n"),
        ({"locked_bytes": 65536}, "limits", Status.FAILURE, "ulimit -l unlimited"),
        ({"threads": 16}, "threads", Status.WARNING, "export OMP_NUM_THREADS=8"),
    ],
)
def test_what_a_host_has_too_little_of_is_reported(change, check, status, remedy):
    """Shared memory, open files, locked memory and cores are each checked, with the command that helps."""
    (finding,) = problems(two_hosts(**change))
    assert (finding.check, finding.status) == (check, status)
    assert remedy in finding.remedy
