"""The trainer on real replicas: against a loop by hand, across world sizes, and with a gradient that is not finite."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from dptrain.checkpoint.store import load_newest
from dptrain.data import SampleStream
from dptrain.tasks import Suggestion, Task
from dptrain.tasks.known import linear
from dptrain.tracking.jsonl import read_rows
from dptrain.train import ControlConfig, LogConfig, NoiseConfig, OptimizerConfig, TrainConfig, Trainer
from dptrain.train.step import Stepper
from tests import runs
from tests.replicas import run_replicas

NUM_SAMPLES, NUM_HELD_OUT, SEED = 101, 37, 3


class Numbered(Dataset):
    """Samples (index, features, class), of which those in `broken` have features that are not finite."""

    def __init__(self, num_samples, *, broken=()):
        generator = torch.Generator().manual_seed(5)
        self._features = torch.randn(num_samples, 6, generator=generator)
        self._classes = (self._features @ torch.randn(6, 3, generator=generator)).argmax(1)
        self._features[list(broken)] = math.nan

    def __len__(self):
        return len(self._features)

    def __getitem__(self, index):
        return index, self._features[index], self._classes[index]


def cross_entropy(model, batch):
    _, features, classes = batch
    return functional.cross_entropy(model(features), classes)


def make_task(broken=()):
    return Task(
        name="small",
        model=nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)),
        train_data=Numbered(NUM_SAMPLES, broken=broken),
        eval_data=Numbered(NUM_HELD_OUT),
        eval_metrics={"bits": lambda nats: nats / math.log(2)},
        loss=cross_entropy,
        suggestion=Suggestion(
            learning_rate=0.02, global_batch_size=16, micro_batch_size=4, max_samples=160, eval_every_samples=50
        ),
    )


def make_config(folder, **settings):
    settings = {"control": ControlConfig(law="constant"), "noise": NoiseConfig(every=1), "seed": SEED, **settings}
    settings = {"device": "cpu", **settings}
    return TrainConfig(task="small", run_dir=str(folder), log=LogConfig(tracker="none"), **settings)


def train(folder, *, task=make_task, **settings):
    """Train, and return (parameters after it, summary)."""
    trainer = Trainer(make_config(folder, **settings), task=task)
    summary = trainer.run()
    return [p.detach().clone() for p in trainer._bare_model.parameters()], summary


def rows_of(folder, kind):
    return [row for row in read_rows(Path(folder) / "metrics.jsonl") if row["kind"] == kind]


def index_window(position, size):
    return SampleStream(NUM_SAMPLES, seed=SEED).indices(np.arange(position, position + size)).tolist()


# Against a loop that is written by hand

BATCH, MICRO, STEPS, RATE, WARMUP, CLIP = 24, 6, 20, 0.02, 50, 0.5


def plain_loop(rank, world_size):
    """Train as a PyTorch user would by hand: DDP, no_sync, clipping, AdamW, a cosine in samples."""
    torch.manual_seed(SEED)
    bare = make_task().model
    model, data = DistributedDataParallel(bare), Numbered(NUM_SAMPLES)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in bare.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in bare.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    accumulation = BATCH // (MICRO * world_size)
    for step in range(STEPS):
        end = (step + 1) * BATCH
        done = (end - WARMUP) / (STEPS * BATCH - WARMUP)
        factor = end / WARMUP if end < WARMUP else 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        for micro_step in range(accumulation):
            first = step * BATCH + (micro_step * world_size + rank) * MICRO
            batch = torch.utils.data.default_collate([data[i] for i in index_window(first, MICRO)])
            model.require_backward_grad_sync = micro_step == accumulation - 1
            (cross_entropy(model, batch) / accumulation).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        optimizer.step()
        optimizer.zero_grad()
    return list(bare.parameters())


def compare_with_plain_loop(rank, world_size, folder):
    expected = plain_loop(rank, world_size)
    same = {}
    for observer in ("parameters", "hook"):
        found, _ = train(
            Path(folder) / observer,
            global_batch_size=BATCH,
            micro_batch_size=MICRO,
            max_samples=STEPS * BATCH,
            noise=NoiseConfig(observer=observer, every=1),
            optimizer=OptimizerConfig(learning_rate=RATE, warmup_samples=WARMUP, max_grad_norm=CLIP),
        )
        same[observer] = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    return same


def test_constant_control_is_a_loop_written_by_hand_bit_for_bit(tmp_path):
    """Two replicas with two micro-batches each, clipped: the same parameters, with either observer and without one."""
    assert (
        run_replicas(compare_with_plain_loop, world_size=2, args=(tmp_path,))
        == [{"parameters": True, "hook": True}] * 2
    )
    clipped = [row["train/grad_norm"] > CLIP for row in rows_of(tmp_path / "hook", "train")]
    assert len(clipped) == STEPS
    assert any(clipped)
    assert not all(clipped)


# Across world sizes

SCHEDULE = "0:16 64:32 150:8 200:24"


def train_noting_samples(rank, world_size, folder):
    """Train twice, with a constant batch and with one that changes; return what the first learned and what it saw."""
    parameters, _ = train(Path(folder) / "constant")
    steps = []
    take_step = Stepper.step

    def note_step(stepper, record, *, report):
        steps.append([])
        return take_step(stepper, record, report=report)

    def noting_loss(model, batch):
        if model.training:
            steps[-1].extend(batch[0].tolist())
        return cross_entropy(model, batch)

    Stepper.step = note_step
    steps.append([])  # for the check of the task
    train(
        Path(folder) / "schedule",
        task=lambda: replace(make_task(), loss=noting_loss),
        control=ControlConfig(law="schedule", schedule=SCHEDULE),
        max_samples=3 * NUM_SAMPLES,
    )
    return [p.tolist() for p in parameters], steps[1:]


@pytest.fixture(scope="module")
def by_world_size(tmp_path_factory):
    """Results of `train_noting_samples` of all ranks, and its folder, for each world size."""
    found = {}
    for world_size in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"world-{world_size}")
        found[world_size] = run_replicas(train_noting_samples, world_size=world_size, args=(folder,)), folder
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicas_equal_accumulation(by_world_size, world_size):
    """1 × 4, 2 × 2 and 4 × 1 replicas × accumulation: the same parameters, losses and norms to float tolerance."""
    (one, folder), (several, other) = by_world_size[1], by_world_size[world_size]
    for parameters, _ in several:
        assert parameters == several[0][0]
    for a, b in zip(one[0][0], several[0][0], strict=True):
        assert np.asarray(a) == pytest.approx(np.asarray(b), rel=1e-4, abs=1e-6)
    rows, other_rows = rows_of(folder / "constant", "train"), rows_of(other / "constant", "train")
    assert [row["batch/accumulation"] for row in rows] == [4] * 10
    assert [row["batch/accumulation"] for row in other_rows] == [4 // world_size] * 10
    for name in ("train/loss", "train/grad_norm", "noise_scale/trace", "noise_scale/grad_sq"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in other_rows], rel=1e-3), name


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_samples_of_a_step_do_not_depend_on_the_world_size(by_world_size, world_size):
    """While the batch changes, each step sees its window of the stream, and no sample is lost or doubled in a pass."""
    results, folder = by_world_size[world_size]
    rows = rows_of(folder / "schedule", "train")
    steps = [list(chain(*parts)) for parts in zip(*(seen for _, seen in results), strict=True)]
    assert {16, 32, 8, 24} <= {row["batch/global"] for row in rows}
    assert [len(step) for step in steps] == [row["batch/global"] for row in rows]
    position = 0
    for step in steps:
        assert sorted(step) == sorted(index_window(position, len(step)))
        position += len(step)
    assert Counter(chain(*steps)) == dict.fromkeys(range(NUM_SAMPLES), 3)


def test_the_batches_of_a_schedule_do_not_depend_on_the_world_size(by_world_size):
    """The same batch at the same position, and the same decisions on it with the same reasons."""
    batches, decisions = [], []
    for _, folder in by_world_size.values():
        batches.append([row["batch/global"] for row in rows_of(folder / "schedule", "train")])
        rows = read_rows(folder / "schedule" / "decisions.jsonl")
        moves = [row for row in rows if row["batch/before"] != row["batch/after"]]  # the rate goes by what is measured
        decisions.append([(row["step"], row["batch/before"], row["batch/after"], row["reason"]) for row in moves])
    assert batches[0] == batches[1] == batches[2]
    assert decisions[0] == decisions[1] == decisions[2]
    assert len(decisions[0]) == 3


# What is told


def test_one_row_for_each_step_and_one_for_each_evaluation(by_world_size):
    """Rows number the steps without a hole, positions add up, and evaluations stand where they were due."""
    _, folder = by_world_size[2]
    rows = rows_of(folder / "schedule", "train")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    ends = [row["progress/samples"] for row in rows]
    assert ends == np.cumsum([row["batch/global"] for row in rows]).tolist()
    assert ends[-1] == 3 * NUM_SAMPLES
    due = [end for end, row in zip(ends, rows, strict=True) if end // 50 > (end - row["batch/global"]) // 50]
    evaluations = rows_of(folder / "schedule", "eval")
    assert [row["progress/samples"] for row in evaluations] == sorted({*due, ends[-1]})
    assert all(row["eval/bits"] == pytest.approx(row["eval/loss"] / math.log(2)) for row in evaluations)


def test_decisions_say_why(by_world_size):
    """Each change of the batch has a row with a sentence, and the batch follows two steps later at the latest."""
    _, folder = by_world_size[2]
    batches = {row["step"]: row["batch/global"] for row in rows_of(folder / "schedule", "train")}
    for row in read_rows(folder / "schedule" / "decisions.jsonl"):
        assert row["batch/after"] == batches[row["step"] + 2]
        stays = row["batch/before"] == row["batch/after"]
        assert row["reason"].startswith("the batch stays at " if stays else "schedule: ")


def test_the_summary_has_the_figures_of_the_run(by_world_size):
    """Every key is there, and those that the rows tell too agree with them."""
    _, folder = by_world_size[4]
    summary = json.loads((folder / "schedule" / "summary.json").read_text())
    rows, evaluations = rows_of(folder / "schedule", "train"), rows_of(folder / "schedule", "eval")
    keys = """task world_size backend samples_seen steps wall_s samples_per_s loss_first loss_last eval_loss
    bits_per_byte batch_first batch_last num_batch_changes noise_scale noise_scale_lower noise_scale_upper resolved
    steps_dropped"""
    assert set(keys.split()) <= set(summary)
    assert (summary["task"], summary["world_size"], summary["backend"]) == ("small", 4, "gloo")
    assert (summary["samples_seen"], summary["steps"]) == (3 * NUM_SAMPLES, len(rows))
    assert (summary["loss_first"], summary["loss_last"]) == (rows[0]["train/loss"], rows[-1]["train/loss"])
    assert (summary["batch_first"], summary["batch_last"], summary["num_batch_changes"]) == (16, 24, 3)
    assert summary["eval_loss"] == evaluations[-1]["eval/loss"]
    assert summary["steps_dropped"] == 0
    assert summary["samples_per_s"] == pytest.approx(summary["samples_seen"] / summary["wall_s"])


# A gradient that is not finite


def train_with_a_broken_sample(rank, world_size, folder, name, broken_step):
    """Train on data of which one sample, seen by one replica, breaks the gradient; return what each step changed."""
    changes, take_step = [], Stepper.step

    def everything(stepper):
        tensors = [p.detach() for p in stepper._model.parameters()]
        for state in stepper._update._optimizer.state.values():
            tensors += [state[key] for key in sorted(state)]
        return torch.cat([tensor.flatten().double() for tensor in tensors])

    def note_change(stepper, record, *, report):
        before = everything(stepper)
        pending = take_step(stepper, record, report=report)
        after = everything(stepper)
        # AdamW makes its state in the first step: zeros, of which a skipped step must leave nothing else.
        before = functional.pad(before, (0, len(after) - len(before)))
        changes.append((not torch.equal(before, after), bool(torch.isfinite(after).all())))
        return pending

    Stepper.step = note_change
    (broken,) = index_window((broken_step - 1) * 16 + 5, 1)
    assert broken > 1, "the check of the task would meet it"
    optimizer = OptimizerConfig(name=name, weight_decay=0.1)
    _, summary = train(folder, task=lambda: make_task(broken=[broken]), optimizer=optimizer, max_samples=5 * 16)
    Stepper.step = take_step
    return changes, summary and summary["steps_dropped"]


def train_with_broken_samples(rank, world_size, folder):
    return [
        train_with_a_broken_sample(rank, world_size, Path(folder) / f"{name}-{step}", name, step)
        for name, step in BROKEN
    ]


BROKEN = [("adamw", 1), ("adamw", 3), ("sgd", 1), ("sgd", 3)]


@pytest.fixture(scope="module")
def broken_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    results = run_replicas(train_with_broken_samples, world_size=2, args=(folder,))
    return {case: (folder, [result[i] for result in results]) for i, case in enumerate(BROKEN)}


@pytest.mark.parametrize(("name", "step"), BROKEN)
def test_a_step_that_is_not_finite_on_one_replica_is_skipped_on_all(broken_runs, name, step):
    """Parameters and moments stay bit for bit, on every rank; the step is counted; all others change them."""
    folder, results = broken_runs[name, step]
    for changes, dropped in results:
        assert changes == [(number != step, True) for number in range(1, 6)]
        assert dropped == 1
    rows = rows_of(folder / f"{name}-{step}", "train")
    assert [row["train/steps_dropped"] for row in rows] == [int(number >= step) for number in range(1, 6)]
    assert [row["train/loss"] is None for row in rows] == [number == step for number in range(1, 6)]
    assert json.loads((folder / f"{name}-{step}" / "summary.json").read_text())["steps_dropped"] == 1


# The batch adapts

TRUE_SCALE = 64.0


def adapt(rank, world_size, folder):
    train(
        folder,
        task=lambda: linear(dimension=128, grad_sq_norm=128 / TRUE_SCALE),
        control=ControlConfig(law="noise", largest=4096),
        global_batch_size=8,
        max_samples=10_000,
    )


def test_the_batch_finds_the_noise_scale(tmp_path):
    """Started eight times too small, the batch comes within a factor of 2 of the true noise scale and stays there."""
    run_replicas(adapt, world_size=2, args=(tmp_path,))
    rows = rows_of(tmp_path, "train")
    assert rows[0]["batch/global"] == TRUE_SCALE / 8
    settled = [row for row in rows if row["progress/samples"] > 4_000]
    assert all(TRUE_SCALE / 2 <= row["batch/global"] <= 2 * TRUE_SCALE for row in settled[:-1])
    assert rows[-1]["noise_scale/state"] == "resolved"
    assert rows[-1]["noise_scale/lower"] <= TRUE_SCALE <= rows[-1]["noise_scale/upper"]


# What is used


class Metered:
    """An energy counter that draws a joule each time that it is asked, and tells of them when it must."""

    drawn = told = 0

    def take_j(self, *, at_once=False):
        self.drawn += 1
        new, self.told = (self.drawn - self.told, self.drawn) if at_once else (0, self.told)
        return float(new)


def test_the_energy_of_the_last_step_and_of_the_evaluation_is_counted(tmp_path):
    """The report of a step is of what was before it; the end of the run has all, and so has its checkpoint."""
    trainer = Trainer(runs.make_config(tmp_path, max_samples=40), task=runs.noisy)
    trainer._energy = meter = Metered()
    summary = trainer.run()
    assert summary["energy_j"] == meter.drawn == summary["steps"] + 1
    assert load_newest(tmp_path / "checkpoints").state["ledger"]["energy_j"] == meter.drawn
