"""The start scripts: what they ask torchrun and SLURM for, seen through stand-ins that print how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = ROOT / "launch" / "torchrun.sh"
SBATCH = ROOT / "launch" / "slurm.sbatch"

PRINT_CALL = """#!/usr/bin/env bash
printf '<%s>' "$@"; echo
echo "OMP_NUM_THREADS=$OMP_NUM_THREADS SHARE_OFF=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""


def _write(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def stand_ins(tmp_path):
    """A folder for stand-ins, with a torchrun that prints its arguments; it goes first on PATH."""
    _write(tmp_path, "torchrun", PRINT_CALL)
    _write(tmp_path, "nproc", "#!/bin/sh\necho 12\n")
    return tmp_path


def _environment(stand_ins, **settings):
    return {"PATH": f"{stand_ins}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), **settings}


def _torchrun(stand_ins, *arguments, **settings):
    return subprocess.run(
        [TORCHRUN, *arguments], env=_environment(stand_ins, **settings), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", [TORCHRUN, SBATCH, ROOT / ".ci" / "run"])
def test_the_scripts_parse(script):
    """Bash reads each script without complaint."""
    assert subprocess.run(["/bin/bash", "-n", script], capture_output=True, check=False).returncode == 0


def test_one_node_meets_on_a_port_that_torchrun_finds(stand_ins):
    """One node needs no address; arguments with spaces go through whole."""
    result = _torchrun(stand_ins, "--config", "my run.yaml", NPROC="4")
    call, variables = result.stdout.splitlines()
    assert call == "<--standalone><--nproc-per-node><4><-m><dptrain><train><--config><my run.yaml>"
    assert variables == "OMP_NUM_THREADS=3 SHARE_OFF=1"


@pytest.mark.parametrize(("rank", "is_host"), [("0", 1), ("1", 0)])
def test_two_nodes_meet_at_the_head(stand_ins, rank, is_host):
    """Both nodes name the same meeting point, and node 0 alone serves it."""
    result = _torchrun(stand_ins, NPROC="8", NNODES="2", NODE_RANK=rank, HEAD="node-a", PORT="1234", RUN_ID="7")
    assert result.stdout.splitlines()[0] == (
        "<--nnodes><2><--rdzv-backend><c10d><--rdzv-id><7><--rdzv-endpoint><node-a:1234>"
        f"<--rdzv-conf><is_host={is_host}><--nproc-per-node><8><-m><dptrain><train>"
    )


@pytest.mark.parametrize(("nproc", "given", "threads"), [("3", "", "4"), ("16", "", "1"), ("3", "2", "2")])
def test_the_cores_are_shared_out_unless_threads_are_set(stand_ins, nproc, given, threads):
    """Each replica gets its share of the cores, at least one; a value from outside is left alone."""
    result = _torchrun(stand_ins, NPROC=nproc, OMP_NUM_THREADS=given)
    assert f"OMP_NUM_THREADS={threads} " in result.stdout


def test_replicas_follow_the_devices_unless_given(stand_ins):
    """Without NPROC the number of replicas is what torch counts as devices."""
    _write(stand_ins, "python", "#!/bin/sh\necho 6\n")
    assert "<--nproc-per-node><6>" in _torchrun(stand_ins).stdout


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"NNODES": "2", "NODE_RANK": "0"}, "so HEAD must name the node"),
        ({"NNODES": "2", "HEAD": "a"}, "NODE_RANK must be 0 to 1, got ''"),
        ({"NNODES": "2", "HEAD": "a", "NODE_RANK": "2"}, "NODE_RANK must be 0 to 1, got 2"),
        ({"NNODES": "two"}, "NNODES must be a whole number of at least 1, got 'two'"),
        ({"NPROC": "gpu"}, "NPROC must be a whole number of at least 1, got 'gpu'"),
    ],
)
def test_a_wrong_setting_gets_one_sentence_and_no_start(stand_ins, settings, sentence):
    """What cannot work is refused before torchrun is called."""
    result = _torchrun(stand_ins, **{"NPROC": "1", **settings})
    assert result.returncode == 2
    assert sentence in result.stderr
    assert not result.stdout


def test_a_missing_torchrun_is_named(tmp_path):
    """Where the environment is not active the script says how to activate it."""
    result = _torchrun(tmp_path, NPROC="1")
    assert result.returncode == 2
    assert "torchrun is not on PATH" in result.stderr


SLURM = {
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "node-[a-b]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_ID": "4321",
    "NPROC": "1",
}

SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node-a\\nnode-b\\n'; else echo "scontrol $*"; fi
"""

SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for id in 0 1; do SLURM_NODEID=$id "$@"; done
"""


def test_slurm_starts_one_torchrun_per_node_at_the_first_node(stand_ins):
    """Each node calls torchrun.sh with its own rank and the address of the first node of the job."""
    _write(stand_ins, "scontrol", SCONTROL)
    _write(stand_ins, "srun", SRUN)
    result = subprocess.run(
        [SBATCH, "--config", "my run.yaml"],
        env=_environment(stand_ins, **SLURM),
        capture_output=True,
        text=True,
        check=True,
    )
    calls = [line for line in result.stdout.splitlines() if line.startswith("<")]
    assert len(calls) == 2
    for is_host, call in zip((1, 0), calls, strict=True):
        assert f"<--rdzv-id><4321><--rdzv-endpoint><node-a:29821><--rdzv-conf><is_host={is_host}>" in call
        assert call.endswith("<train><--config><my run.yaml><--run_dir><runs/slurm-4321>")


def test_a_requeued_job_goes_on_with_its_run_folder(stand_ins):
    """The second attempt resumes what the first one left; where that left nothing it begins."""
    _write(stand_ins, "scontrol", SCONTROL)
    _write(stand_ins, "srun", SRUN)
    for run_dir, end in ((stand_ins, "<--resume>"), (stand_ins / "none", f"<{stand_ins / 'none'}>")):
        environment = _environment(stand_ins, **SLURM, SLURM_RESTART_COUNT="1", RUN_DIR=str(run_dir))
        result = subprocess.run([SBATCH], env=environment, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[0].endswith(end)


def test_the_warning_before_the_time_limit_requeues_the_job(stand_ins):
    """On USR1 the script asks for its job to be queued again, and waits for the step to end."""
    _write(stand_ins, "scontrol", SCONTROL)
    _write(stand_ins, "srun", "#!/bin/sh\necho started\nsleep 1\necho ended\n")
    environment = _environment(stand_ins, **SLURM)
    with subprocess.Popen([SBATCH], env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "started\n"
        job.send_signal(signal.SIGUSR1)
        rest = job.stdout.read().splitlines()
    assert rest == ["scontrol requeue 4321", "ended"]
    assert job.returncode == 0


def test_the_scripts_are_executable():
    """A script that is called by its path has its bit set."""
    assert all(os.access(path, os.X_OK) for path in (TORCHRUN, ROOT / ".ci" / "run"))
