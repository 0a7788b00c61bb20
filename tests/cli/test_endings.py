"""How a run ends is what its trainer reports: whatever a task, a disk or a terminal does besides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from dptrain.cli.train import _refused_in_one_sentence
from dptrain.errors import CheckpointError, TaskError

TASK = """
import os, sys, torch
from torch import nn
from torch.utils.data import Dataset
from dptrain.tasks import Suggestion, Task

class Data(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        if where == "data" and len(seen) > 300:
            end()
        seen.append(index)
        return torch.randn(2), torch.randn(1)

seen = []
where, how = os.environ.get("TEST_WHERE", ""), os.environ.get("TEST_HOW", "")

def end():
    if how == "interrupt":
        raise KeyboardInterrupt
    os._exit(0) if how == "os._exit(0)" else sys.exit({"": None, "0": 0, "75": 75}[how])

def loss(model, batch):
    if where == "slope":  # a gradient that is finite wherever the parameters are
        return model(batch[0]).mean() * 1e-3
    if where == "loss" and len(seen) > 300:
        end()
    return ((model(batch[0]) - batch[1]) ** 2).mean()

def build():
    if where == "task":
        end()
    return Task(
        name="ends", model=nn.Linear(2, 1), train_data=Data(), eval_data=None, loss=loss,
        suggestion=Suggestion(
            learning_rate=0.01, global_batch_size=8, micro_batch_size=4, max_samples=4000, eval_every_samples=4000
        ),
    )
"""


SMALL = ["--device", "cpu", "--replicas", "2", "--run_dir", "run", "--log.tracker", "none"]


def train(folder, *arguments, **environment):
    """Run the command on two replicas; return exit code and standard error."""
    (folder / "task.py").write_text(TASK)
    task = [] if "--task" in arguments else ["--task", "task.py:build"]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "dptrain",
            "train",
            *task,
            "--device",
            "cpu",
            "--replicas",
            "2",
            "--run_dir",
            "run",
            "--control.law",
            "constant",
            "--log.tracker",
            "none",
            "--max-restarts",
            "0",
            *arguments,
        ],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        errors="replace",
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("where", "how", "code"),
    [
        ("data", "75", 1),
        ("loss", "0", 1),
        ("task", "", 2),
        ("data", "os._exit(0)", 70),
        ("loss", "interrupt", 1),
    ],
)
def test_a_task_that_ends_the_process_does_not_end_the_run(tmp_path, where, how, code):
    """`sys.exit()` or KeyboardInterrupt in data, loss or task is a reported failure; so is an end without a word."""
    found, output = train(tmp_path, TEST_WHERE=where, TEST_HOW=how)
    assert found == code, output
    assert not (tmp_path / "run" / "summary.json").exists()
    words = {1: "the task called sys.exit(", 2: "could not be built: SystemExit"}
    if how == "interrupt":
        words = {1: "the task raised KeyboardInterrupt before"}
    words |= {70: "before its trainer had reported"}
    assert words[code] in output.splitlines()[-1]


@pytest.mark.parametrize("law", ["constant", "noise"])
def test_a_run_that_diverges_in_its_last_steps_has_diverged(tmp_path, law):
    """A checkpoint that is refused because parameters are infinite is no failure of the disk: exit code 65."""
    options = ("--max_samples", "32", "--optimizer.learning_rate", "1e30", "--control.law", law)
    code, output = train(tmp_path, *options, TEST_WHERE="slope")
    assert code == 65, output
    assert "holds infinity" in output.splitlines()[-1]
    assert not (tmp_path / "run" / "summary.json").exists()


def warn_and_raise(text, error):
    with _refused_in_one_sentence():
        warnings.warn(text, stacklevel=1)
        raise error


def test_a_refusal_is_told_without_the_warnings_of_what_it_refuses():
    """Those of an accepted task come as soon as it is accepted, and a filter that a task file sets stays set."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(TaskError):
            warn_and_raise("of the model", TaskError("refused"))
        assert not shown
        with _refused_in_one_sentence():
            warnings.warn("of the model", stacklevel=1)
            warnings.filterwarnings("ignore", "of the task")
            assert not shown
        warnings.warn("of the task", stacklevel=1)
        assert [str(warning.message) for warning in shown] == ["of the model"]
        with pytest.raises(CheckpointError):
            warn_and_raise("of the disk", CheckpointError("no fault of the task"))
        assert [str(warning.message) for warning in shown] == ["of the model", "of the disk"]


def test_a_terminal_without_unicode_ends_no_run(tmp_path):
    """Standard output in latin-1: done is done, and what it cannot write is spelled out."""
    code, output = train(tmp_path, "--task", "quadratic", "--max_samples", "200", PYTHONIOENCODING="latin-1")
    assert (code, output) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path):
    """The run is done and saved; the folder takes no report, here because a folder has its name."""
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    code, output = train(tmp_path, "--task", "quadratic", "--max_samples", "200")
    assert code == 0, output
    assert output.startswith("dptrain train: warning: the run is done and saved, but its report could not be written: ")
    assert output.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_in_the_first_seconds(tmp_path, number, code):
    """SIGUSR1 finds nothing to save, and the run goes on; Ctrl-C ends it, and there is nothing to resume."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dptrain",
            "train",
            "--task",
            "quadratic",
            "--max_samples",
            "200",
            "--device",
            "cpu",
            "--replicas",
            "2",
            "--run_dir",
            "run",
            "--log.tracker",
            "none",
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Handled from the first line of the program on: a process with the signal in its mask of caught ones has begun.
    deadline_s = time.monotonic() + 30
    while not catches(process.pid, signal.SIGUSR1):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
    process.send_signal(number)
    _, output = process.communicate(timeout=120)
    assert process.returncode in (code, -code + 128 if code > 128 else code), output
    assert (tmp_path / "run" / "summary.json").exists() == (code == 0)
    said = "dptrain train: stopped before training began: nothing was written; start it again as before\n"
    assert output == ("" if code == 0 else said)


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    with open(f"/proc/{pid}/status") as file:  # noqa: PTH123 - no file of disks
        mask = next(line for line in file if line.startswith("SigCgt"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


SPLIT = """
import numpy as np, os, random, torch
from torch import nn
from torch.utils.data import Dataset
from dptrain.tasks import Suggestion, Task

WORDS = {word: number for number, word in enumerate({f"word{i}" for i in range(50)})}

class Data(Dataset):
    def __init__(self, order):
        self.order = order
    def __len__(self):
        return len(self.order)
    def __getitem__(self, index):
        return float(self.order[index]), f"word{self.order[index] % 50}"

def collate(samples):
    return torch.tensor([[x, WORDS[word]] for x, word in samples])

def build():
    order = np.random.permutation(200).tolist()
    random.shuffle(order)
    with open(f"seen-{os.environ['TEST_LAUNCH']}-{os.environ['RANK']}", "w") as file:
        file.write(f"{order} {sorted(WORDS.items())}")
    return Task(
        name="split", model=nn.Linear(2, 1), train_data=Data(order[50:]), eval_data=Data(order[:50]), collate=collate,
        loss=lambda model, batch: (model(batch) ** 2).mean(),
        suggestion=Suggestion(
            learning_rate=1e-6, global_batch_size=8, micro_batch_size=4, max_samples=64, eval_every_samples=64
        ),
    )
"""


def test_what_a_task_builds_is_the_same_on_all_replicas_and_in_all_launches(tmp_path):
    """A split by numpy's and Python's generators, unseeded, and a vocabulary of a set: under torchrun and without.

    Each process would have others of its own: hashes of text and seeds of generators are fixed before the task is
    built, so that the program that was tried on one host is the one that runs on several.
    """
    (tmp_path / "split.py").write_text(SPLIT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launch, start in (("a", torchrun), ("b", [])):
        command = [sys.executable, *start, "-m", "dptrain", "train", "--task", "split.py:build", "--device", "cpu"]
        command += ["--run_dir", launch, "--log.tracker", "none"] + ([] if start else ["--replicas", "2"])
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
        environment |= {"OMP_NUM_THREADS": "1", "TEST_LAUNCH": launch, "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150, check=False
        )
        assert ended.returncode == 0, ended.stderr
    assert len({path.read_text() for path in tmp_path.glob("seen-*")}) == 1
    assert len(list(tmp_path.glob("seen-*"))) == 4
