"""`dptrain doctor` across real processes: a good run passes, and each injected fault is named within 30 s."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dptrain.cli.main import main

ROOT = Path(__file__).parents[3]
LIMIT_S = 30.0


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*arguments, cwd=ROOT, prefix=(), package=ROOT, **variables):
    """Start the doctor on one host, without what a launcher round these tests may have set."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "dptrain", "doctor", "--json", *map(str, arguments)],
        cwd=cwd,
        env={**inherited, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reports_of(process):
    """The exit code of a host and the reports that its ranks printed."""
    out, err = process.communicate(timeout=120)
    assert not [line for line in err.splitlines() if line.strip() and "[c10d]" not in line], err  # torch warns of names
    return process.returncode, [json.loads(line) for line in out.splitlines()]


def problem(*hosts, check):
    """The text and the remedy of the one problem that rank 0 names, within the time limit."""
    endings = [reports_of(host) for host in hosts]
    code, (report,) = endings[0]
    assert code == 78
    assert not report["ok"]
    assert report["took_s"] <= LIMIT_S
    (finding,) = [finding for finding in report["findings"] if finding["status"] == "failure"]
    assert finding["check"] == check
    assert finding["remedy"]
    return finding["text"], finding["remedy"]


def two_hosts(port, *arguments, second=None, **variables):
    """The doctor as two hosts of one rank each, on loopback; `second` overrides for the second."""
    fixed = ("--nnodes", 2, "--nproc", 1, "--head", "127.0.0.1", "--port", port)
    return [
        start(*fixed, "--node-rank", rank, *arguments, **(variables | ((second or {}) if rank else {})))
        for rank in range(2)
    ]


def test_a_sound_machine_passes(tmp_path):
    """All checks pass on this machine with exit code 0, each with what was found, within 30 s."""
    code, (report,) = reports_of(start("--run-dir", tmp_path / "run"))
    assert code == 0
    assert report["ok"]
    assert (report["world_size"], report["num_hosts"]) == (2, 1)
    assert report["took_s"] <= LIMIT_S
    figures = {finding["check"]: finding["figures"] for finding in report["findings"]}
    assert {"devices", "versions", "interface", "run folder", "ranks", "clocks", "all-reduce", "limits"} <= set(figures)
    assert figures["all-reduce"]["bus_bytes_per_s"] > 0
    assert figures["all-reduce"]["latency_s"] > 0
    assert list(tmp_path.iterdir()) == []


def test_two_hosts_pass_and_only_rank_0_speaks(tmp_path):
    """Two commands that meet give one report, and both the exit code 0."""
    endings = [reports_of(host) for host in two_hosts(free_port(), "--run-dir", tmp_path / "run")]
    assert [code for code, _ in endings] == [0, 0]
    assert [len(reports) for _, reports in endings] == [1, 0]


def test_torchrun_starts_it_too(tmp_path):
    """Under torchrun each process is one rank, and the store is the agent's."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dptrain")
    done = subprocess.run(
        [*command, "doctor", "--json", "--run-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["ok"]


def test_a_wrong_interface_is_named(tmp_path):
    """An interface that this machine lacks is named with the variable that asks for it, and those that it has."""
    text, remedy = problem(start("--run-dir", tmp_path, GLOO_SOCKET_IFNAME="nope0"), check="interface")
    assert text.startswith("GLOO_SOCKET_IFNAME is 'nope0', but ranks 0–1 has only ")
    assert "lo (127.0.0.1)" in text
    assert "GLOO_SOCKET_IFNAME" in remedy


def test_a_port_in_use_is_named(tmp_path):
    """The port is named with who listens there."""
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        text, remedy = problem(start("--run-dir", tmp_path, "--port", port, "--nproc", 1), check="rendezvous")
    assert text.startswith(f"port {port}, where rank 0 is to serve, is in use by ")
    assert f"(pid {os.getpid()})" in text
    assert "free port" in remedy


def test_a_missing_rank_is_named(tmp_path):
    """Of three hosts the one that was not started is named, with the address that it must reach."""
    port = free_port()
    fixed = ("--nnodes", 3, "--nproc", 1, "--head", "127.0.0.1", "--port", port, "--run-dir", tmp_path)
    hosts = [start(*fixed, "--node-rank", rank) for rank in (0, 2)]
    text, remedy = problem(*hosts, check="ranks")
    assert text == "rank 1 of 3 did not come within 15 s"
    assert "node 1 (NODE_RANK)" in remedy
    assert f"127.0.0.1:{port}" in remedy


def test_a_missing_rank_0_is_named_by_the_others(tmp_path):
    """Without rank 0 the others say that they do not reach it, and where they tried."""
    port = free_port()
    fixed = ("--nnodes", 2, "--nproc", 1, "--head", "127.0.0.1", "--port", port, "--wait", "2", "--run-dir", tmp_path)
    text, _ = problem(start(*fixed, "--node-rank", 1), check="rendezvous")
    assert text == f"rank 1 did not reach rank 0 at 127.0.0.1:{port} within 2 s: refused: nobody listens there"


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    """One relative name that is two folders is reported as such."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    hosts = two_hosts(free_port(), "--run-dir", "run", cwd=folders[0], second={"cwd": folders[1]})
    text, remedy = problem(*hosts, check="run folder")
    assert text.startswith("run of rank 0 (host ")
    assert "is another folder than that of rank 1" in text
    assert "absolute path on storage that all hosts mount" in remedy


def test_versions_that_differ_are_named(tmp_path):
    """A host with another release of dptrain is named with both releases; so is other code of the same release."""
    package = tmp_path / "other"
    shutil.copytree(ROOT / "dptrain", package / "dptrain", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "dptrain" / "version.py").write_text('"""Another release."""\n\n__version__ = "0.0.7"\n')
    hosts = two_hosts(free_port(), "--run-dir", tmp_path, second={"package": package, "cwd": package})
    endings = [reports_of(host) for host in hosts]
    assert [code for code, _ in endings] == [78, 78]
    texts = [finding["text"] for finding in endings[0][1][0]["findings"] if finding["status"] == "failure"]
    assert re.match(r"dptrain differs: \S+ on rank 0; 0\.0\.7 on rank 1$", texts[0])
    assert texts[1].startswith("the code of dptrain differs: ")
    assert endings[0][1][0]["took_s"] <= LIMIT_S


def test_no_gpu_visible_is_named(tmp_path):
    """Where GPUs are asked for and hidden, the variable that hides them is named."""
    host = start("--run-dir", tmp_path, "--device", "cuda", "--nproc", 1, CUDA_VISIBLE_DEVICES="")
    text, remedy = problem(host, check="devices")
    assert text == "no GPU visible to rank 0: CUDA_VISIBLE_DEVICES is '', which hides all GPUs"
    assert "unset CUDA_VISIBLE_DEVICES" in remedy


def test_a_head_on_another_machine_is_named(tmp_path):
    """Rank 0 that is to serve at an address of another machine says so at once."""
    fixed = ("--nnodes", 2, "--nproc", 1, "--port", free_port(), "--run-dir", tmp_path)
    text, _ = problem(start(*fixed, "--node-rank", 0, "--head", "203.0.113.7"), check="rendezvous")
    assert "203.0.113.7, which is no address of this host" in text


NAMES = ("dptrain-a", "dptrain-b")


def ip(*arguments):
    return (
        subprocess.run([shutil.which("ip") or "ip", *arguments], capture_output=True, text=True, check=False).returncode
        == 0
    )


@pytest.fixture
def namespaces():
    """Two network namespaces with a link between them: two machines that share the rest."""
    names = [f"{name}-{os.getpid()}" for name in NAMES]
    links = [f"v{os.getpid() % 100000}{end}" for end in "ab"]
    if os.geteuid() != 0 or shutil.which("ip") is None or not all(ip("netns", "add", name) for name in names):
        for name in names:
            ip("netns", "del", name)
        pytest.skip("needs root, iproute2 and a kernel that gives out network namespaces")
    try:
        assert ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, ("10.99.0.1/24", "10.99.0.2/24"), strict=True):
            assert ip("link", "set", link, "netns", name)
            assert ip("-n", name, "addr", "add", address, "dev", link)
            assert ip("-n", name, "link", "set", link, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield [("ip", "netns", "exec", name) for name in names], links
    finally:
        for name in names:
            ip("netns", "del", name)


def in_namespaces(namespaces, run_dir, interfaces):
    """The doctor in both namespaces, each given an interface."""
    prefixes, _ = namespaces
    fixed = ("--nnodes", 2, "--nproc", 1, "--head", "10.99.0.1", "--port", 29517, "--run-dir", run_dir)
    return [
        start(*fixed, "--node-rank", rank, prefix=prefixes[rank], GLOO_SOCKET_IFNAME=interfaces[rank])
        for rank in range(2)
    ]


def test_two_machines_pass_by_their_link(namespaces, tmp_path):
    """Over a real link between two networks the ranks are counted as two hosts, and all-reduce."""
    endings = [reports_of(host) for host in in_namespaces(namespaces, tmp_path, namespaces[1])]
    assert [code for code, _ in endings] == [0, 0]
    assert endings[0][1][0]["num_hosts"] == 2


def test_an_interface_that_other_hosts_cannot_reach_is_named(namespaces, tmp_path):
    """Loopback on one of two machines is named with the rank, and the interface that would do."""
    link = namespaces[1][1]
    text, remedy = problem(*in_namespaces(namespaces, tmp_path, [namespaces[1][0], "lo"]), check="interface")
    assert text.startswith("rank 1")
    assert "127.0.0.1, a loopback address, by GLOO_SOCKET_IFNAME=lo" in text
    assert link in remedy


def test_a_wrong_option_gets_one_sentence(capsys):
    """What cannot be examined is refused in a sentence with exit code 2."""
    for arguments, sentence in (
        (["--nnodes", "two"], "nnodes must be a whole number, got 'two'"),
        (["--nnodes", "2", "--nproc", "1", "--node-rank", "1"], "give its name or address with --head"),
        (["--wait", "0"], "--wait must be a number of seconds above 0"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert sentence in capsys.readouterr().err
