"""The start scripts: what they ask torchrun and SLURM for, seen through fake commands that print their calls."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch import short_runs

ROOT = Path(__file__).parents[2]
TORCHRUN = ROOT / "launch" / "torchrun.sh"
SBATCH = ROOT / "launch" / "slurm.sbatch"

PRINT_CALL = """#!/usr/bin/env bash
[[ "$1" == -c ]] && echo 6 && exit
[[ "$1 $2" == "-m dptrain.runtime.hosts.torchrun" ]] || exit 3
shift 2
printf '<%s>' "$@"; echo
echo "OMP_NUM_THREADS=$OMP_NUM_THREADS SHARE_OFF=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""


def _write(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def fake_commands(tmp_path):
    """A folder for fake commands, with a python that prints the arguments of torchrun; it goes first on PATH."""
    _write(tmp_path, "torchrun", "#!/bin/sh\nexit 3\n")
    _write(tmp_path, "python", PRINT_CALL)
    _write(tmp_path, "nproc", "#!/bin/sh\necho 12\n")
    return tmp_path


def _environment(fake_commands, **settings):
    return {"PATH": f"{fake_commands}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), **settings}


def _torchrun(fake_commands, *arguments, **settings):
    return subprocess.run(
        [TORCHRUN, *arguments], env=_environment(fake_commands, **settings), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", [TORCHRUN, SBATCH, ROOT / ".ci" / "run"])
def test_the_scripts_parse(script):
    """Bash reads each script without complaint."""
    assert subprocess.run(["/bin/bash", "-n", script], capture_output=True, check=False).returncode == 0


def test_one_node_meets_on_a_port_that_torchrun_finds(fake_commands):
    """One node needs no address; arguments with spaces go through whole."""
    result = _torchrun(fake_commands, "--config", "my run.yaml", NPROC="4")
    call, variables = result.stdout.splitlines()
    assert call == "<--standalone><--nproc-per-node><4><-m><dptrain><train><--config><my run.yaml>"
    assert variables == "OMP_NUM_THREADS=3 SHARE_OFF=1"


@pytest.mark.parametrize(("rank", "is_host"), [("0", 1), ("1", 0)])
def test_two_nodes_meet_at_the_head(fake_commands, rank, is_host):
    """Both nodes name the same meeting point, and node 0 alone serves it."""
    result = _torchrun(fake_commands, NPROC="8", NNODES="2", NODE_RANK=rank, HEAD="node-a", PORT="1234", RUN_ID="7")
    assert result.stdout.splitlines()[0] == (
        "<--nnodes><2><--rdzv-backend><c10d><--rdzv-id><7><--rdzv-endpoint><node-a:1234>"
        f"<--rdzv-conf><is_host={is_host},keep_alive_interval=3,last_call_timeout=5><--max-restarts><3><--nproc-per-node><8><-m><dptrain><train>"
    )


def test_nodes_may_come_and_go(fake_commands):
    """A range of nodes, a number of restarts and another command go to torchrun as they are."""
    settings = {"NPROC": "1", "NNODES": "1:3", "NODE_RANK": "2", "HEAD": "node-a", "MAX_RESTARTS": "9"}
    call = _torchrun(fake_commands, COMMAND="doctor", **settings).stdout.splitlines()[0]
    assert call.startswith("<--nnodes><1:3>")
    assert "<--max-restarts><9>" in call
    assert call.endswith("<-m><dptrain><doctor>")
    single = _torchrun(fake_commands, NPROC="1", MAX_RESTARTS="2").stdout.splitlines()[0]
    assert single.startswith("<--standalone><--max-restarts><2>")


@pytest.mark.parametrize(("nproc", "given", "threads"), [("3", "", "4"), ("16", "", "1"), ("3", "2", "2")])
def test_the_cores_are_shared_out_unless_threads_are_set(fake_commands, nproc, given, threads):
    """Each replica gets its share of the cores, at least one; a value from outside is left alone."""
    result = _torchrun(fake_commands, NPROC=nproc, OMP_NUM_THREADS=given)
    assert f"OMP_NUM_THREADS={threads} " in result.stdout


def test_replicas_follow_the_devices_unless_given(fake_commands):
    """Without NPROC the number of replicas is what torch counts as devices."""
    assert "<--nproc-per-node><6>" in _torchrun(fake_commands).stdout


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"NNODES": "2", "NODE_RANK": "0"}, "so HEAD must name the node"),
        ({"NNODES": "2", "HEAD": "a"}, "NODE_RANK must be 0 to 1, got ''"),
        ({"NNODES": "2", "HEAD": "a", "NODE_RANK": "2"}, "NODE_RANK must be 0 to 1, got 2"),
        ({"NNODES": "two"}, "NNODES must be a whole number of at least 1, or a range such as 1:3, got 'two'"),
        ({"NNODES": "3:1"}, "NNODES must be MIN:MAX with MIN at most MAX, got '3:1'"),
        ({"NPROC": "gpu"}, "NPROC must be a whole number of at least 1, got 'gpu'"),
    ],
)
def test_a_wrong_setting_gets_one_sentence_and_no_start(fake_commands, settings, sentence):
    """What cannot work is refused before torchrun is called."""
    result = _torchrun(fake_commands, **{"NPROC": "1", **settings})
    assert result.returncode == 2
    assert sentence in result.stderr
    assert not result.stdout


def test_a_missing_torchrun_is_named(tmp_path):
    """Where the environment is not active the script says how to activate it."""
    result = _torchrun(tmp_path, NPROC="1")
    assert result.returncode == 2
    assert "torchrun is not on PATH" in result.stderr


def test_wrong_settings_end_with_their_own_code():
    """Schedulers go by it: job.yaml gives up at 2, and 1 would have it started again."""
    result = subprocess.run(
        [TORCHRUN, "--task", "nosuch"],
        env=short_runs.environment(NPROC="1"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "unknown task 'nosuch'" in result.stderr


def test_skypilots_machines_have_what_the_task_needs():
    """Each extra that the task of the example needs is installed by its setup."""
    job = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    assert "--task digits" in job["run"]
    assert "'.[train,report,tasks]'" in job["setup"]


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
for id in 0 1; do SLURM_NODEID=$id "$@" || exit; done
"""


def test_slurm_starts_one_torchrun_per_node_at_the_first_node(fake_commands):
    """Each node calls torchrun.sh with its own rank and the address of the first node of the job."""
    _write(fake_commands, "scontrol", SCONTROL)
    _write(fake_commands, "srun", SRUN)
    result = subprocess.run(
        [SBATCH, "--config", "my run.yaml"],
        env=_environment(fake_commands, **SLURM),
        capture_output=True,
        text=True,
        check=True,
    )
    calls = [line for line in result.stdout.splitlines() if line.startswith("<")]
    assert len(calls) == 2
    for is_host, call in zip((1, 0), calls, strict=True):
        assert f"<--rdzv-id><4321><--rdzv-endpoint><node-a:29821><--rdzv-conf><is_host={is_host},keep" in call
        assert "<--max-restarts><0>" in call  # a lost node's job is started again by SLURM
        assert call.endswith("<train><--config><my run.yaml><--run-dir><runs/slurm-4321>")


def test_slurm_checks_the_nodes_first_where_asked(fake_commands):
    """DOCTOR=1 runs the checks on each node before the training, and a fault that they find ends the job."""
    _write(fake_commands, "scontrol", SCONTROL)
    _write(fake_commands, "srun", SRUN)
    for code in (0, 78):
        _write(fake_commands, "dptrain", f'#!/bin/sh\necho "checked as $NODE_RANK: $*"\nexit {code}\n')
        environment = _environment(fake_commands, **SLURM, DOCTOR="1", RUN_DIR="/r")
        result = subprocess.run([SBATCH], env=environment, capture_output=True, text=True, check=False)
        assert "checked as 0: doctor --run-dir /r\n" in result.stdout
        assert ("<-m><dptrain><train>" in result.stdout) == (code == 0)
        assert result.returncode == code


def test_a_requeued_job_goes_on_with_its_run_folder(fake_commands):
    """The second attempt resumes what the first one left; where that left nothing it begins."""
    _write(fake_commands, "scontrol", SCONTROL)
    _write(fake_commands, "srun", SRUN)
    for run_dir, end in ((fake_commands, "<--resume>"), (fake_commands / "none", f"<{fake_commands / 'none'}>")):
        environment = _environment(fake_commands, **SLURM, SLURM_RESTART_COUNT="1", RUN_DIR=str(run_dir))
        result = subprocess.run([SBATCH], env=environment, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[0].endswith(end)


def test_the_warning_before_the_time_limit_requeues_the_job(fake_commands):
    """On USR1 the script asks for its job to be queued again, and waits for the step to end."""
    _write(fake_commands, "scontrol", SCONTROL)
    _write(fake_commands, "srun", "#!/bin/sh\necho started\nsleep 1\necho ended\n")
    environment = _environment(fake_commands, **SLURM)
    with subprocess.Popen([SBATCH], env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "started\n"
        job.send_signal(signal.SIGUSR1)
        rest = job.stdout.read().splitlines()
    assert rest == ["scontrol requeue 4321", "ended"]
    assert job.returncode == 0


def _tool(name):
    """A checker that `make env` installs."""
    return str(Path(sys.executable).parent / name)


def test_shellcheck_has_nothing_to_say(tmp_path):
    """The scripts, and those inside skypilot.yaml, pass shellcheck without a remark; a planted fault does not."""
    inside = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    _write(tmp_path, "setup.sh", f"#!/usr/bin/env bash\n{inside['setup']}")
    _write(tmp_path, "run.sh", f"#!/usr/bin/env bash\n{inside['run']}")
    scripts = [TORCHRUN, SBATCH, ROOT / ".ci" / "run", tmp_path / "setup.sh", tmp_path / "run.sh"]
    done = subprocess.run([_tool("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    _write(tmp_path, "planted.sh", "#!/usr/bin/env bash\nrm -rf $1/x\n")
    planted = subprocess.run([_tool("shellcheck"), tmp_path / "planted.sh"], capture_output=True, check=False)
    assert planted.returncode == 1


def test_hadolint_has_nothing_to_say(tmp_path):
    """The Dockerfile passes hadolint without a remark; a planted fault does not."""
    done = subprocess.run([_tool("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /x\n")
    planted = subprocess.run([_tool("hadolint"), tmp_path / "Dockerfile"], capture_output=True, check=False)
    assert planted.returncode == 1


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "launch").rglob("*.*") if path.suffix != ".md"))
def test_each_file_says_who_runs_it_what_to_change_and_what_was_run(name):
    """The header of a launch file tells its reader what it is for and what has been tried."""
    (path,) = [path for path in (ROOT / "launch").rglob(name) if "__pycache__" not in path.parts]
    head = path.read_text()[:2500]
    for words in ("Who runs it: ", "What to change: ", "What was run for real: ", "Not run: "):
        assert words in head, words


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(processes):
    """Wait for processes that make one run together; all must end well."""
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)


def start(command, **variables):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=short_runs.environment(**variables), **streams)


def test_accelerate_starts_the_replicas(tmp_path):
    """`accelerate launch` with the file, as on two machines, trains one run with two replicas."""
    num_machines = 2
    arguments = ["--config_file", str(ROOT / "launch" / "accelerate.yaml"), "--num_processes", "2"]
    of_all = ["--num_machines", str(num_machines), "--main_process_ip", "127.0.0.1"]
    train = ["-m", "dptrain", "train", *short_runs.write_task(tmp_path), "--run-dir", str(tmp_path / "run")]
    port = str(free_port())
    finish(
        [
            start(
                [
                    "accelerate",
                    "launch",
                    *arguments,
                    *of_all,
                    "--machine_rank",
                    str(rank),
                    "--main_process_port",
                    port,
                    *train,
                ]
            )
            for rank in range(num_machines)
        ]
    )
    assert {row["time/world_size"] for row in short_runs.train_rows(tmp_path / "run")} == {2}


def test_skypilots_commands_train_and_resume(tmp_path):
    """`run` trains on two machines with SkyPilot's variables; taken away and started again, the run goes on."""
    script = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())["run"]
    assert script.count("--task digits") == 1
    script = script.replace("--task digits", shlex.join(short_runs.write_task(tmp_path)))
    delay, run_dir = tmp_path / "delay", tmp_path / "run"
    of_all = {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2",
        "SKYPILOT_TASK_ID": "7",
        "RUN_ROOT": str(tmp_path),
        "RUN_NAME": "run",
        "NPROC": "1",
        "TEST_DELAY": str(delay),
    }

    def machines():
        port = str(free_port())
        return [start(["bash", "-c", script], SKYPILOT_NODE_RANK=str(rank), PORT=port, **of_all) for rank in range(2)]

    delay.write_text("0.3")
    first = machines()
    try:
        short_runs.wait_until(lambda: short_runs.has_checkpoint(run_dir), what="a checkpoint")
        for machine in first:
            machine.terminate()
        assert all(machine.wait(100) for machine in first)
    finally:
        for machine in first:
            machine.kill()
            machine.communicate()
    stopped_at = short_runs.train_rows(run_dir)[-1]["step"]
    delay.write_text("0")
    finish(machines())
    rows = short_runs.train_rows(run_dir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert stopped_at < len(rows)
    assert rows[-1]["progress/samples"] == 240
    assert {row["time/world_size"] for row in rows} == {2}


def test_the_scripts_are_executable():
    """A script that is called by its path has its bit set."""
    assert all(os.access(path, os.X_OK) for path in (TORCHRUN, ROOT / ".ci" / "run"))
