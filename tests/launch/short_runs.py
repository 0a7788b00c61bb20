"""Short runs that launchers start, disturb and finish, beside the same run undisturbed; read by their files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

TASK = '''"""A regression whose targets are mostly noise; each micro-batch takes the seconds in the file TEST_DELAY."""

import os
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from dptrain.tasks import Suggestion, Task


def slow_loss(model, batch):
    if path := os.environ.get("TEST_DELAY"):
        time.sleep(float(Path(path).read_text()))
    features, targets = batch
    return ((model(features) - targets) ** 2).mean()


def noisy():
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(90, 4, generator=generator), torch.randn(90, 1, generator=generator))
    return Task(
        name="noisy",
        model=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        train_data=data,
        eval_data=data,
        loss=slow_loss,
        suggestion=Suggestion(
            learning_rate=0.01, global_batch_size=4, micro_batch_size=2, max_samples=240, eval_every_samples=80
        ),
    )
'''


def write_task(folder):
    """Write the task's file and return the arguments that train it, a checkpoint every 20 samples."""
    path = Path(folder) / "task.py"
    path.write_text(TASK)
    settings = (
        "--device",
        "cpu",
        "--log.tracker",
        "none",
        "--control.law",
        "noise",
        "--checkpoint.every_samples",
        "20",
    )
    return ["--task", f"{path}:noisy", *settings]


def environment(**variables):
    """The environment of a launcher: this interpreter's commands first on PATH, this checkout's package, one thread."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PET_", "RAY_"))}
    return {
        **ours,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def train_undisturbed(folder, arguments, *, replicas=2):
    """Train the same run by the launcher of one machine."""
    command = [sys.executable, "-m", "dptrain", "train", *arguments, "--replicas", str(replicas), "--run-dir", folder]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def train_rows(run_dir):
    """The rows of the steps so far; a line that is being written is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def has_checkpoint(run_dir):
    """Whether there is something to resume from."""
    return any((Path(run_dir) / "checkpoints").glob("step-*/model.safetensors"))


def outcome(run_dir):
    """What was trained: losses and batches step by step, and the bytes of the last parameters."""
    newest = max((Path(run_dir) / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    names = ("step", "progress/samples", "batch/global", "train/loss", "time/world_size")
    steps = [{name: row[name] for name in names} for row in train_rows(run_dir)]
    return {"steps": steps, "parameters": (newest / "model.safetensors").read_bytes()}


def wait_until(condition, *, what, limit_s=120.0, alive=lambda: True):
    """Wait for an event; fail with `what` where it does not come, or where what it needs is dead."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert alive(), f"ended before: {what}"
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.1)
    return found
