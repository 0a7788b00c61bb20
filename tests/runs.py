"""Small runs that are killed, resumed and compared; used by tests of several rooms."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from dptrain.checkpoint.store import load_newest
from dptrain.data import SampleStream, slots
from dptrain.tasks import Suggestion, Task
from dptrain.tracking.jsonl import read_rows
from dptrain.train import (
    CheckpointConfig,
    ControlConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    Trainer,
)
from dptrain.train.step import Stepper

EVERY = 23
BY_CLOCK = {
    "progress/wall_s",
    "throughput/samples_per_sec",
    "throughput/tokens_per_sec",
    "time/step_s",
    "ledger/device_s",
    "device_s",
    "wall_s",
    "samples_per_s",
    "step_time_error",
}
NUM_SAMPLES = 90


class Noisy(Dataset):
    """Targets that are mostly noise, each sample with its number."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.features = torch.randn(NUM_SAMPLES, 4, generator=generator)
        self.targets = torch.randn(NUM_SAMPLES, 1, generator=generator)

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        return self.features[index], self.targets[index], index


SUGGESTION_OF_NOISY = Suggestion(
    learning_rate=0.01, global_batch_size=4, micro_batch_size=2, max_samples=230, eval_every_samples=60
)


def noisy():
    """Build a model with dropout on targets that are mostly noise, so that the batch grows soon."""
    return Task(
        name="noisy",
        model=nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)),
        train_data=Noisy(),
        eval_data=Noisy(),
        loss=slow_loss,
        suggestion=SUGGESTION_OF_NOISY,
    )


def slow_loss(model, batch):
    """Mean squared error; as slow as TEST_MICRO_STEP_S says, and noting its samples where TEST_LEDGER says."""
    if slow_s := float(os.environ.get("TEST_MICRO_STEP_S", "0")):  # a sleep of no time gives the core away all the same
        time.sleep(slow_s)
    features, target, indices = batch
    if (ledger := os.environ.get("TEST_LEDGER")) and model.training:
        with Path(ledger).open("a") as file:
            file.write(json.dumps(indices.tolist()) + "\n")
    return ((model(features) - target) ** 2).mean()


def make_config(folder, *, keep=3, **settings):
    """Settings of a run that saves at no multiple of any batch."""
    settings = {
        "device": "cpu",
        "control": ControlConfig(law="noise", min_gain=0.0, largest=16),
        "checkpoint": CheckpointConfig(every_samples=EVERY, keep=keep),
        "noise": NoiseConfig(every=1),
        "optimizer": OptimizerConfig(weight_decay=0.01),
        "log": LogConfig(tracker="none"),
        **settings,
    }
    return TrainConfig(**{"task": f"{__file__}:noisy", "run_dir": str(folder), **settings})


class Killed(BaseException):
    """Takes the place of a death: nothing between two steps catches it."""


def kill():
    """Die in the process's stead."""
    raise Killed


def attempt(folder, *, kill_at=None, kill=kill, keep=3, config=None, task=noisy):
    """Train from the newest checkpoint, if there is one, and die in the step `kill_at`."""
    take_step = Stepper.step

    def step_or_die(stepper, record, *, report):
        pending = take_step(stepper, record, report=report)
        if record.step == kill_at:
            kill()
        return pending

    Stepper.step = step_or_die
    try:
        resume = (Path(folder) / "config.yaml").exists()
        return Trainer(config or make_config(folder, keep=keep), task=task, resume=resume).run()
    finally:
        Stepper.step = take_step


def without_clock(record):
    """Leave out clock times."""
    return {key: value for key, value in record.items() if key not in BY_CLOCK}


def result_of(folder):
    """Everything that a run leaves, less all clock times."""
    folder = Path(folder)
    saved = load_newest(folder / "checkpoints")
    state = {**saved.state, "progress": without_clock(saved.state["progress"])}
    del state["step_timer"], state["ledger"]
    state["undecided"] = without_clock(state["undecided"])
    state["config"] = {key: value for key, value in state["config"].items() if key not in ("run_dir", "checkpoint")}
    return {
        "parameters": (saved.path / "model.safetensors").read_bytes(),
        "optimizer": (saved.path / "optimizer.safetensors").read_bytes(),
        "state": state,
        "rows": [without_clock(row) for row in read_rows(folder / "metrics.jsonl")],
        "decisions": read_rows(folder / "decisions.jsonl"),
        "summary": without_clock(json.loads((folder / "summary.json").read_text())),
    }


def trained(folder):
    """What was trained, decided and reported; not how it was asked for, nor from which task file."""
    found = result_of(folder)
    del found["state"]["config"], found["state"]["data"]["sources"]
    return {part: found[part] for part in ("parameters", "optimizer", "state", "rows", "decisions")}


def assert_same(found, expected):
    """Name the part in which two results differ."""
    for part, value in expected.items():
        assert found[part] == value, part


def windows(folder):
    """The (step, first position, batch, micro-batch) of each step that a run has reported."""
    rows = [row for row in read_rows(Path(folder) / "metrics.jsonl") if row["kind"] == "train"]
    return [
        (row["step"], row["progress/samples"] - row["batch/global"], row["batch/global"], row["batch/micro"])
        for row in rows
    ]


def reads(folder, *, rank, world_size, first, last):
    """What a rank reads in the steps from `first` to `last` of a run: the sample numbers of each micro-batch."""
    stream = SampleStream(NUM_SAMPLES, seed=0)
    found = []
    for step, position, batch, micro in windows(folder):
        if first <= step <= last:
            layout = {"global_batch_size": batch, "micro_batch_size": micro, "world_size": world_size}
            for slot in slots(position=position, **layout, rank=rank):
                count = max(1, slot.num_samples)  # without a micro-batch it reads one sample, to keep in step
                found.append(stream.indices(np.arange(slot.position, slot.position + count)).tolist())
    return found


def wait_for_step(folder, step, process):
    """Wait until a run that another process trains has reported a step."""
    path = Path(folder) / "metrics.jsonl"
    deadline_s = time.monotonic() + 60
    while not (path.exists() and any(row["step"] >= step for row in read_rows(path))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
