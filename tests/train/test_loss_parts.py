"""Losses with named parts: logged in training, exact over replicas and uneven micro-batches, in the one reduction."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from dptrain.data import SampleStream
from dptrain.errors import TaskError
from dptrain.tasks import Suggestion, Task, check_task
from dptrain.tracking.jsonl import read_rows
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, TrainConfig, Trainer
from tests.replicas import run_replicas

NUM_SAMPLES, BATCH, STEPS = 52, 14, 3
LENGTH = STEPS * BATCH - 3  # the last step has eleven samples, so that its micro-batches are uneven


def task(*, with_parts=True, names=("square", "number")):
    numbers = torch.arange(float(NUM_SAMPLES)).unsqueeze(1)

    def loss(model, batch):
        (number,) = batch
        fit = (model(number / NUM_SAMPLES) ** 2).mean()
        parts = {names[0]: (number**2).mean(), names[1]: number.mean()}
        return {"loss": fit, **parts} if with_parts else fit

    return Task(
        name="parts",
        model=nn.Linear(1, 1),
        train_data=TensorDataset(numbers),
        loss=loss,
        suggestion=Suggestion(
            learning_rate=0.01, global_batch_size=BATCH, micro_batch_size=4, max_samples=10, eval_every_samples=10
        ),
    )


def train(folder, *, task):
    config = TrainConfig(
        run_dir=str(folder),
        max_samples=LENGTH,
        device="cpu",
        control=ControlConfig(law="constant"),
        noise=NoiseConfig(every=2),
        checkpoint=CheckpointConfig(every_samples=10**9),
        log=LogConfig(tracker="none", every_steps=1),
    )
    Trainer(config, task=task).run()
    return [row for row in read_rows(Path(folder) / "metrics.jsonl") if row["kind"] == "train"]


def in_both_ways(rank, world_size, folder):
    counts = []
    all_reduce = dist.all_reduce

    def counted(*arguments, **named):
        counts[-1] += 1
        return all_reduce(*arguments, **named)

    dist.all_reduce = counted
    for with_parts in (True, False):
        counts.append(0)
        train(Path(folder) / str(with_parts), task=partial(task, with_parts=with_parts))
    return counts


def check(rows):
    stream = SampleStream(NUM_SAMPLES, seed=0)
    seen = 0
    for row in rows:
        numbers = stream.window(seen, row["progress/samples"] - seen).astype(float)
        seen = row["progress/samples"]
        assert row["train/number"] == pytest.approx(numbers.mean(), rel=1e-6)
        assert row["train/square"] == pytest.approx((numbers**2).mean(), rel=1e-6)
    assert seen == LENGTH


def test_parts_are_means_over_all_samples_of_the_step_and_need_no_further_collective(tmp_path):
    """On two replicas with uneven micro-batches each part is the mean over the step's samples, without a collective."""
    counts = run_replicas(in_both_ways, world_size=2, args=(str(tmp_path),))
    with_parts, without = (
        [row for row in read_rows(tmp_path / way / "metrics.jsonl") if row["kind"] == "train"]
        for way in ("True", "False")
    )
    check(with_parts)
    assert len(with_parts) == STEPS
    assert all(with_them == without_them for with_them, without_them in counts)
    for one, other in zip(with_parts, without, strict=True):
        assert one["train/loss"] == other["train/loss"]
        assert one.get("noise_scale/trace") == other.get("noise_scale/trace")


def test_one_process_logs_the_same_parts(tmp_path):
    """Without a process group the parts are the same means."""
    check(train(tmp_path / "run", task=task))


def test_a_part_with_the_name_of_a_column_is_refused():
    """A part named `lr` would overwrite the learning rate in the log."""
    with pytest.raises(TaskError, match="train/lr"):
        check_task(task(names=("lr", "number")))


def test_a_loss_whose_parts_change_ends_the_run(tmp_path):
    """Parts travel by place, so a loss that returns others at some step is an error that names both."""
    changing, calls = task(), []
    stable = changing.loss

    def loss(model, batch):
        calls.extend([None] * model.training)
        found = stable(model, batch)
        return found if len(calls) < 6 else {"loss": found["loss"]}

    object.__setattr__(changing, "loss", loss)
    with pytest.raises(TaskError, match="returned the parts none here and number, square before"):
        train(tmp_path / "run", task=changing)
