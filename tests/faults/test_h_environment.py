"""Rows H5, H6 and H12 of the faults: ports, interfaces and variables that are not as a launcher would have them.

What `meet` makes of each is in tests/runtime/test_rendezvous.py; here is what a user gets.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dptrain.cli.main import main
from dptrain.runtime.launcher import refuse_in_many_tasks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refuse(monkeypatch, capsys, tmp_path):
    """Run the command under these variables; return exit code, its one sentence, and the seconds that it took."""
    for name in ("DPTRAIN_STORE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)

    def run(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        began_s = time.monotonic()
        code = main(["train", "--task", "quadratic", "--device", "cpu", "--run_dir", str(tmp_path / "run")])
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("dptrain train: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()
        return code, err, time.monotonic() - began_s

    return run


def test_h5_a_port_in_use_is_a_clear_error(refuse):
    """Within five seconds. A run on one node needs no port at all (G8)."""
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 - held on all addresses, as a server does
        port = taken.getsockname()[1]
        code, output, took_s = refuse(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert code == 69
    assert f"port {port}, where the replicas are to meet, is in use" in output
    assert took_s < 5


def test_h6_a_wrong_interface_is_a_clear_error(tmp_path):
    """Also where two replicas have it: reported once, with the variable, and not tried again."""
    found = subprocess.run(
        [
            sys.executable,
            *("-m", "dptrain", "train", "--task", "quadratic", "--replicas", "2", "--device", "cpu"),
            *("--run_dir", str(tmp_path / "a")),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "nope0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 69, found.stderr
    output = [line for line in found.stderr.splitlines() if line.startswith("dptrain train: ")]
    assert len(output) == 1
    assert output[0].startswith("dptrain train: met the other replicas, but cannot connect to them: ")
    assert "GLOO_SOCKET_IFNAME is 'nope0'" in output[0]
    assert "Traceback" not in found.stderr


def test_h12_variables_left_over_are_explained(refuse):
    """With the command that removes them; a process that nobody started as a replica would else wait for ever."""
    code, output, _ = refuse(RANK=0, WORLD_SIZE=2)
    assert code == 69
    assert "`unset RANK WORLD_SIZE`" in output


@pytest.mark.parametrize(
    ("variables", "starter", "remedy"),
    [
        ({"SLURM_STEP_NUM_TASKS": 4}, "srun started 4", "launch/slurm.sbatch, or srun --ntasks 1"),
        (
            {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1, "PMI_SIZE": 2},
            "srun started 2",
            "launch/slurm.sbatch",
        ),
        ({"OMPI_COMM_WORLD_SIZE": 8, "OMPI_COMM_WORLD_RANK": 3}, "mpirun started 8", "launch/torchrun.sh"),
        ({"PMI_SIZE": 2, "PMI_RANK": 0}, "mpiexec started 2", "mpiexec -n 1"),
    ],
)
def test_h12_several_launchers_at_once_are_refused(refuse, variables, starter, remedy):
    """`srun dptrain train` on four tasks would start four runs in one folder; so would mpirun."""
    code, output, _ = refuse(**variables)
    assert code == 2
    assert f"{starter} of this command" in output
    assert remedy in output


def test_h12_a_sweep_under_srun_is_refused(monkeypatch, capsys):
    """Each task would train the whole grid into the same folder."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert main(["sweep", "--task", "quadratic"]) == 2
    assert "srun started 2 of this command" in capsys.readouterr().err


def test_h12_one_task_of_a_job_is_no_crowd():
    """`srun --ntasks 1`, and a shell inside an allocation of several tasks, go on."""
    refuse_in_many_tasks({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "2", "OMPI_COMM_WORLD_SIZE": "1"})
    refuse_in_many_tasks({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})


def test_h12_a_launcher_in_a_launcher_is_refused(monkeypatch, capsys):
    """Under torchrun the replicas are started already."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--replicas", "2"]) == 2
    assert "--replicas has no meaning under a launcher" in capsys.readouterr().err
