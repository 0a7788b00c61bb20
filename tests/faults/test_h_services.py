"""H1–H4, H7 and H8 of the faults: trackers that fail, clocks that jump, output nobody reads, resources that run out."""

from __future__ import annotations

import ast
import http.server
import json
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from dptrain.tracking.tracker import FINISH_LIMIT_S, START_LIMIT_S

ROOT = Path(__file__).parents[2]
CANARY = "canary0123456789canary0123456789canary01"


def bare_environment(home, **more):
    """Return an environment in which nobody is logged in anywhere, and one thread is enough."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


# H1 and H2, the tracker

TRACKED = """
import os, signal, sys, time
from pathlib import Path
import psutil
from accelerate import PartialState
from dptrain.tracking.tracker import start_tracker
PartialState(cpu=True)
begun = time.monotonic()
tracked = start_tracker(
    choice="auto", project="p", run_name="n", run_dir=Path(sys.argv[1]),
    config={"width": 12345, "leak": os.environ["WANDB_API_KEY"]}, warn=lambda text: print("SAID", text),
)
print("STARTED", time.monotonic() - begun)
for step in range(1, 101):
    if step == 50 and sys.argv[2] == "kill":
        for child in psutil.Process().children():
            child.send_signal(signal.SIGKILL)
        time.sleep(0.5)
    tracked.log({"kind": "train", "step": step, "progress/samples": step * 8, "train/loss": 1 / step}, step=step)
begun = time.monotonic()
tracked.finish({"loss_last": 0.01})
print("FINISHED", time.monotonic() - begun)
"""


def track(folder, *, url, fate="live"):
    """Track a run in another process; return what it said, all that it printed, and seconds to start and finish."""
    done = subprocess.run(
        [sys.executable, "-c", TRACKED, folder, fate],
        capture_output=True,
        text=True,
        env=bare_environment(folder, WANDB_API_KEY=CANARY, WANDB_BASE_URL=url),
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    said = [text for kind, _, text in lines if kind == "SAID"]
    started_s, finished_s = (float(text) for kind, _, text in lines if kind in ("STARTED", "FINISHED"))
    return said, done.stdout + done.stderr, started_s, finished_s


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request that nobody may come in."""

    def _refuse(self):
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = do_HEAD = _refuse  # noqa: N815 - the names that the server looks for

    def log_message(self, *_args):
        pass


@contextmanager
def server(kind):
    """Yield the address of a server of loopback that is none."""
    if kind == "no such name":
        yield "http://wandb.invalid"
    elif kind == "never answers":
        with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    else:
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as refusing:
            threading.Thread(target=refusing.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{refusing.server_port}"
            refusing.shutdown()


@pytest.mark.parametrize("kind", ["no such name", "never answers", "401"])
def test_h1_a_run_without_a_server_is_recorded_offline(tmp_path, kind):
    """Training starts in time, with one line that says how to upload; the record is whole, and no secret is in it."""
    with server(kind) as url:
        said, printed, started_s, _ = track(tmp_path, url=url)
    assert started_s < START_LIMIT_S + 2
    # On a busy machine wandb is not there in time, and that is said before.
    (upload,) = (text for text in said if not text.startswith("wandb has not started"))
    folder = Path(shlex.split(upload.split("wandb sync ")[1])[0])
    assert folder.is_relative_to(tmp_path / "wandb")
    (record,) = folder.glob("*.wandb")
    content = record.read_bytes()
    assert content.count(b"train/loss") >= 100
    assert all(name in content for name in (b"progress/samples", b"loss_last", b"12345", b"[secret]"))
    everything = [printed.encode(), *(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())]
    assert not any(CANARY.encode() in text for text in everything)


def test_h2_a_killed_service_process_does_not_stop_the_run(tmp_path):
    """Where wandb's own process dies in mid-run, there is one more warning, and the run ends well and in time."""
    said, _, _, finished_s = track(tmp_path, url="http://127.0.0.1:9", fate="kill")
    said = [text for text in said if not text.startswith("wandb has not started")]  # on a busy machine
    assert [text.startswith("wandb is switched off") for text in said] == [False, True]
    assert finished_s < FINISH_LIMIT_S + 2


# A run of the command as its only replica, for what follows

TASK = """
import os, torch
from torch import nn
from torch.utils.data import Dataset
from dptrain.tasks import Suggestion, Task

if os.environ.get("TEST_MAY_FORK") == "no":
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")
    os.fork = refuse

class Points(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return torch.full((int(os.environ.get("TEST_SIZE", "2")),), float(index))

def loss(model, batch):
    return (model(batch[:, :2]) - 1).square().mean()

def points():
    return Task(name="points", model=nn.Linear(2, 1), train_data=Points(), eval_data=Points(), loss=loss,
        suggestion=Suggestion(learning_rate=0.01, global_batch_size=4, micro_batch_size=2, max_samples=64,
                              eval_every_samples=32))
"""


def train(folder, *arguments, limits=None, shell="", stdout=subprocess.PIPE, prefix=(), **environment):
    """Run `dptrain train` here as the only replica of a launcher; return the finished process."""
    (folder / "its_task.py").write_text(TASK)
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "dptrain", "train", "--task", "its_task.py:points", "--run_dir", "run"]
    command += ["--device", "cpu", "--log.tracker", "none", *arguments]
    if shell:
        command = ["bash", "-c", shell.format(shlex.join(command))]
    return subprocess.run(
        [*prefix, *command],
        cwd=folder,
        env=bare_environment(folder, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **where, **environment),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=limits,
    )


# H4, the clock

CLOCKS = {
    "time.time",
    "time.time_ns",
    "datetime.now",
    "datetime.today",
    "datetime.utcnow",
    "date.today",
    "time.localtime",
}
DATES = {"run_folder.py": 2, "run_facts.py": 1, "heartbeat.py": 1, "plan.py": 1, "network.py": 2}
"""Where the time of day is a name or a stamp: of a run folder and who holds one, of a run, of a sign of life, of
prices; and where `dptrain doctor` compares the clocks of hosts, which is about that very clock."""


def calls(path, names):
    """Return the dotted names of all calls in a file that end in one of `names`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [name for name in found if any(name == wanted or name.endswith(f".{wanted}") for wanted in names)]


def test_h4_no_duration_is_measured_with_a_clock_that_jumps():
    """The time of day is read for names alone; whatever lasts is measured with clocks that only go forward."""
    found = {path.name: len(calls(path, CLOCKS)) for path in (ROOT / "dptrain").rglob("*.py") if calls(path, CLOCKS)}
    assert found == DATES
    imported = [
        node.module
        for path in (ROOT / "dptrain").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and node.module == "time"
        and {a.name for a in node.names} & {"time", "time_ns"}
    ]
    assert imported == []


def test_h4_the_gate_sees_a_clock_that_jumps(tmp_path):
    """The checker finds what it is there for."""
    path = tmp_path / "x.py"
    path.write_text("import time, datetime as dt\ntime.time()\ndt.datetime.now()\ntime.monotonic()\nx.timeout()\n")
    assert calls(path, CLOCKS) == ["time.time", "dt.datetime.now"]


# H7, output that nobody takes


@pytest.mark.parametrize(
    "shell",
    ["set -o pipefail; {} | head -n 1 >&2", "{} >/dev/full", "{} >&- 2>&-"],
    ids=["reader leaves", "full", "all closed"],
)
def test_h7_a_run_goes_on_when_nobody_takes_what_it_prints(tmp_path, shell):
    """Its exit code is 0, and the run folder is whole."""
    done = train(tmp_path, "--log.print_every_steps", "1", shell=shell)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples_seen"] == 64
    assert (tmp_path / "run" / "report.png").exists()


# H8, resources


def limit(kind, value):
    return lambda: resource.setrlimit(kind, (value, value))


def assert_one_sentence(done, part):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("dptrain train: ")
    assert done.stderr.count("\n") == 1
    assert part in done.stderr


@pytest.mark.parametrize(("num_descriptors", "num_workers"), [(64, 2), (30, 2)])
def test_h8_few_file_descriptors_are_enough_or_a_clear_error(tmp_path, num_descriptors, num_workers):
    """A run with two workers needs fewer than 64 of them; with too few it says so, and does not hang."""
    limits = limit(resource.RLIMIT_NOFILE, num_descriptors)
    done = train(tmp_path, "--num_workers", str(num_workers), limits=limits)
    if num_descriptors >= 64:
        assert done.returncode == 0, done.stderr
    else:
        assert_one_sentence(done, "cannot start 2 processes that load samples: Too many open files; lower num_workers")


SHARED_MEMORY = "/dev/shm"  # noqa: S108 - the one of a private namespace


def _may_mount():
    if not shutil.which("unshare"):
        return False
    trial = ["unshare", "-Urm", "mount", "-t", "tmpfs", "-o", "size=1m", "none", SHARED_MEMORY]
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="the kernel allows no private /dev/shm")
def test_h8_shared_memory_that_is_full_is_a_clear_error(on_disk):
    """Workers that cannot hand their samples over end the run with the reason."""
    small = f'mount -t tmpfs -o size=1m none {SHARED_MEMORY} && exec "$@"'
    prefix = ["unshare", "-Urm", "bash", "-c", small, "bash"]
    variables = {"TMPDIR": str(on_disk), "TEST_SIZE": "1000000"}
    done = train(on_disk, "--num_workers", "1", "--device", "cpu", prefix=prefix, **variables)
    assert done.returncode > 0
    assert "shared memory" in done.stderr or "shm" in done.stderr, done.stderr


@pytest.mark.skipif(not _may_mount(), reason="the kernel allows no private /dev/shm")
@pytest.mark.parametrize(("size", "num_workers", "num_replicas"), [("256k", "1", "2"), ("1m", "2", "1")])
def test_h8_the_launcher_names_shared_memory(on_disk, size, num_workers, num_replicas):
    """The last line of the command, as in a container with a small /dev/shm: exit code 1, and its name."""
    (on_disk / "its_task.py").write_text(TASK)
    small = f'mount -t tmpfs -o size={size} none {SHARED_MEMORY} && exec "$@"'
    command = ["unshare", "-Urm", "bash", "-c", small, "bash", sys.executable, "-m", "dptrain", "train"]
    command += ["--task", "its_task.py:points", "--run_dir", "run", "--device", "cpu", "--log.tracker", "none"]
    command += ["--replicas", num_replicas, "--num_workers", num_workers, "--max-restarts", "0"]
    done = subprocess.run(
        command,
        cwd=on_disk,
        env=bare_environment(on_disk, TMPDIR=str(on_disk), TEST_SIZE="500000"),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    reported = [line for line in done.stderr.splitlines() if line.startswith("dptrain train:")]
    assert len(reported) == 1
    assert reported[0] == done.stderr.splitlines()[-1]
    assert "shared memory" in reported[0]


def test_h8_a_limit_on_processes_is_a_clear_error(tmp_path):
    """A run that may start no worker says so. The limit binds no root, so its error is raised in its place."""
    done = train(tmp_path, "--num_workers", "2", TEST_MAY_FORK="no")
    assert_one_sentence(done, "cannot start 2 processes that load samples: Resource temporarily unavailable")
