"""`slurm.sbatch` on a real SLURM: two virtual nodes on loopback, with daemons of the test's own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.launch import short_runs

SBATCH = short_runs.ROOT / "launch" / "slurm.sbatch"
NODES = ("n1", "n2")
NEEDED = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "nsenter", "unshare")

CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={controller}
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdTimeout=10
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
{nodes}
PartitionName=p Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def why_not():
    """What this machine lacks for a SLURM of the test's own, or nothing."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in NEEDED if shutil.which(name, path=path) is None]:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "the daemons of SLURM need root"
    if subprocess.run([shutil.which("unshare"), "--mount", "true"], capture_output=True, check=False).returncode:
        return "the kernel refuses a mount namespace, which the names of the virtual nodes need"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


class Cluster:
    """A controller and two nodes in a mount namespace whose hosts file knows the nodes' names."""

    def __init__(self, folder):
        self.folder = folder
        controller, *ports = free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN"
            for node, port in zip(NODES, ports, strict=True)
        )
        conf = CONF.format(folder=folder, controller=controller, nodes=nodes, names=",".join(NODES))
        (folder / "slurm.conf").write_text(conf)
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        hosts = folder / "hosts"
        hosts.write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {' '.join(NODES)}\n")
        self._environment = short_runs.environment(SLURM_CONF=str(folder / "slurm.conf"))
        self._environment["PATH"] += ":/usr/sbin:/sbin"
        inside = f"mount --bind '{hosts}' /etc/hosts && echo ready && exec sleep infinity"
        self._namespace = subprocess.Popen(
            [shutil.which("unshare"), "--mount", "sh", "-c", inside], stdout=subprocess.PIPE
        )
        assert self._namespace.stdout.readline() == b"ready\n"
        self._daemons = {}

    def start(self):
        """Start the key service, the controller and the nodes, and wait until both nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        paths = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "log", "seed")}
        options = [
            f"--{option}={paths[name]}"
            for option, name in (("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))
        ]
        self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        short_runs.wait_until(paths["socket"].exists, what="munged listens")
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def start_node(self, node):
        self._daemon(node, "slurmd", "-D", "-N", node)

    def wait_for_nodes(self):
        """Wait until all nodes can take a job."""
        short_runs.wait_until(
            lambda: self.run("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * len(NODES),
            what="all nodes are idle",
        )

    def _daemon(self, name, *command):
        log = (self.folder / f"{name}.out").open("ab")
        self._daemons[name] = subprocess.Popen(
            self._inside(command), env=self._environment, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    def _inside(self, command):
        return ["nsenter", f"--mount=/proc/{self._namespace.pid}/ns/mnt", f"--wd={short_runs.ROOT}", *command]

    def run(self, *command, **variables):
        """The output of a command of the cluster; nothing where it failed."""
        done = subprocess.run(
            self._inside(command),
            env=self._environment | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.stdout if done.returncode == 0 else ""

    def submit(self, *arguments, options=(), **variables):
        """Put a run of `slurm.sbatch` into the queue; its number and the file of its output."""
        fixed = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={self.folder}/job-%j.log")
        reported = self.run("sbatch", *fixed, *options, str(SBATCH), *arguments, NPROC="1", **variables)
        job = re.fullmatch(r"Submitted batch job (\d+)\n", reported).group(1)
        return job, self.folder / f"job-{job}.log"

    def state(self, job):
        """The state of a job, such as RUNNING, how often it was restarted, and its exit code."""
        reported = self.run("scontrol", "show", "job", job)
        found = (re.search(rf"{name}=(\S+)", reported) for name in ("JobState", "Restarts", "ExitCode"))
        return tuple(match.group(1) if match else "" for match in found)

    def wait_for_state(self, job, wanted, *, restarts=0, limit_s=240.0):
        """Wait until a job is in a state after so many restarts, without the pause that SLURM puts before a restart."""

        def arrived():
            state, restarted, _ = self.state(job)
            if state == "PENDING":
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
            return state == wanted and int(restarted or 0) >= restarts

        short_runs.wait_until(arrived, what=f"job {job} is {wanted}", limit_s=limit_s)

    def close(self):
        """End the daemons and what is left of their jobs, all started by this test."""
        for job in self.run("squeue", "--noheader", "--format=%i").split():
            self.run("scancel", "--signal=KILL", job)
        for name in reversed(self._daemons):
            self._daemons[name].terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()
        self._namespace.kill()
        self._namespace.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    found = Cluster(folder)
    try:
        found.start()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    return short_runs.write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory):
    """What the run comes to when nothing disturbs it."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    short_runs.train_undisturbed(run_dir, arguments)
    return short_runs.outcome(run_dir)


def test_a_submitted_job_trains_on_both_nodes(cluster, arguments, expected, tmp_path):
    """A job ends as COMPLETED with exit code 0, and trained what one machine with two replicas trains."""
    job, log = cluster.submit(*arguments, RUN_DIR=str(tmp_path / "run"))
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.state(job)[2] == "0:0", log.read_text()
    assert short_runs.outcome(tmp_path / "run") == expected


@pytest.fixture
def delay(tmp_path):
    """A file with the seconds that a micro-batch takes; it may be rewritten while the run goes on."""
    path = tmp_path / "delay"
    path.write_text("0.3")
    return path


def test_the_time_limit_requeues_and_the_job_goes_on(cluster, arguments, expected, delay, tmp_path):
    """Warned of the time limit, the job saves and queues again; its second attempt ends with the same result."""
    run_dir = tmp_path / "run"
    delay.write_text("1")
    job, log = cluster.submit(*arguments, options=("--time=10",), RUN_DIR=str(run_dir), TEST_DELAY=str(delay))
    short_runs.wait_until(lambda: short_runs.train_rows(run_dir), what="the first step")
    # SLURM counts limits in minutes, and looks every half minute whether a warning is due.
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    cluster.wait_for_state(job, "PENDING", limit_s=90)
    stopped_at = short_runs.train_rows(run_dir)[-1]["step"]
    assert short_runs.has_checkpoint(run_dir), log.read_text()
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    delay.write_text("0")
    cluster.wait_for_state(job, "COMPLETED", restarts=1)
    assert short_runs.outcome(run_dir) == expected
    assert f"resumed from step {stopped_at}" in log.read_text()
