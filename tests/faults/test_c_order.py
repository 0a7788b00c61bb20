"""Section C of the fault list: the order of samples under changes of world size, batch size, data and workers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from dptrain.checkpoint.state import pack_model
from dptrain.checkpoint.store import load_newest
from dptrain.data import SampleStream
from dptrain.errors import ConfigError, TaskError
from dptrain.tasks import Suggestion, Task
from dptrain.tracking.jsonl import read_rows
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, TrainConfig, Trainer
from tests.replicas import run_replicas
from tests.runs import Killed, assert_same, attempt, make_config, noisy, reads, result_of, windows


def uninterrupted(rank, world_size, folder, config):
    attempt(folder, config=config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two replicas leave that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run_replicas(uninterrupted, world_size=2, args=(folder, make_config(folder)))
    return folder


def one_stage(rank, world_size, folder, stage, kill_at):
    os.environ["TEST_LEDGER"] = str(Path(folder) / f"ledger-{stage}-{rank}")
    # The first stage lays the run out for two replicas; those that follow leave that open, and find it as it was.
    config = make_config(folder, layout_replicas=2 if stage == 0 else None)
    if kill_at is None:
        attempt(folder, config=config)
    else:
        with pytest.raises(Killed):
            attempt(folder, config=config, kill_at=kill_at)


@pytest.mark.parametrize("seed", [0, 1])
def test_c1_other_replicas_take_the_same_samples_and_decisions(whole, tmp_path, seed):
    """On 1, 2, 3 and 1 replicas in turn: the same windows and decisions, and each replica reads its part of them."""
    last = windows(whole)[-1][0]
    kills = sorted(np.random.default_rng(seed).choice(np.arange(3, last), size=3, replace=False).tolist())
    worlds, starts = [1, 2, 3, 1], []
    for stage, (world_size, kill_at) in enumerate(zip(worlds, [*kills, None], strict=True)):
        saved = load_newest(tmp_path / "checkpoints")
        starts.append(1 if saved is None else saved.step + 1)
        run_replicas(one_stage, world_size=world_size, args=(tmp_path, stage, kill_at))
    assert windows(tmp_path) == windows(whole)
    decisions = [
        [(row["step"], row["batch/after"]) for row in read_rows(run / "decisions.jsonl")] for run in (tmp_path, whole)
    ]
    assert decisions[0] == decisions[1] != []
    for stage, (world_size, first, end) in enumerate(zip(worlds, starts, [*kills, last], strict=True)):
        for rank in range(world_size):
            found = [json.loads(line) for line in (tmp_path / f"ledger-{stage}-{rank}").read_text().splitlines()]
            assert found[:2] == [[0, 1], [0]], "the check of the task comes first, and whether it takes one sample"
            assert found[2:] == reads(whole, rank=rank, world_size=world_size, first=first, last=end), (stage, rank)


def test_c1_every_finished_pass_is_a_permutation(whole):
    """The windows of a run tile its samples without gap or overlap, so that each pass reads every sample once."""
    position = 0
    for _, start, batch, _ in windows(whole):
        assert start == position
        position += batch
    assert position == 230
    micro_batches = reads(whole, rank=0, world_size=1, first=1, last=10**9)
    everything = [index for micro_batch in micro_batches for index in micro_batch]
    for begin in (0, 90):
        assert sorted(everything[begin : begin + 90]) == list(range(90))


def test_c4_every_step_can_be_the_last_of_an_attempt_many_times(whole, tmp_path):
    """Killed in each of the steps round the end of a pass and of the run, one attempt after another: the same end."""
    steps = [
        step
        for step, start, batch, _ in windows(whole)
        if any(start - 4 <= edge <= start + batch + 4 for edge in (90, 180, 230))
    ]
    assert len(steps) >= 4
    run_replicas(kill_in_turn, world_size=2, args=(tmp_path, steps))
    assert_same(result_of(tmp_path), result_of(whole))


def kill_in_turn(rank, world_size, folder, steps):
    for step in steps:
        with pytest.raises(Killed):
            attempt(folder, kill_at=step)
        torch.distributed.barrier()
    attempt(folder)


def linear(samples, *, num_features=3):
    """Build a linear model whose gradient is easy to check."""
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(
        torch.randn(samples, num_features, generator=generator), torch.randn(samples, 1, generator=generator)
    )
    return Task(
        name="linear",
        model=nn.Linear(num_features, 1),
        train_data=data,
        loss=squared_error,
        suggestion=Suggestion(
            learning_rate=0.1, global_batch_size=4, micro_batch_size=2, max_samples=60, eval_every_samples=60
        ),
    )


def squared_error(model, batch):
    features, target = batch
    return ((model(features) - target) ** 2).mean()


def plain_sgd(folder, **settings):
    return TrainConfig(
        **{
            "run_dir": str(folder),
            "device": "cpu",
            "control": ControlConfig(law="constant"),
            "optimizer": OptimizerConfig(
                name="sgd",
                learning_rate=0.1,
                beta1=0.0,
                weight_decay=0.0,
                schedule="constant",
                warmup_samples=0,
                max_grad_norm=None,
            ),
            "log": LogConfig(tracker="none"),
            **settings,
        }
    )


def weights_after(rank, world_size, folder, *, samples, settings):
    config = plain_sgd(Path(folder) / str(world_size), **settings)
    trainer = Trainer(config, task=lambda: linear(samples))
    trainer.run()
    return {name: tensor.tolist() for name, tensor in pack_model(trainer._bare_model).items()}


def on_replicas(rank, world_size, folder, samples, settings):
    return weights_after(rank, world_size, folder, samples=samples, settings=settings)


@pytest.mark.parametrize(
    ("samples", "settings"),
    [
        # No replica count divides it; a replica of three gets nothing in the last micro-step.
        (50, {"global_batch_size": 10, "micro_batch_size": 2, "max_samples": 60, "layout_replicas": 1}),
        # The batch is larger than the data: it spans passes.
        (7, {"global_batch_size": 12, "micro_batch_size": 3, "max_samples": 60, "layout_replicas": 1}),
        # The run is no multiple of the batch: the rest is trained once.
        (50, {"global_batch_size": 8, "micro_batch_size": 2, "max_samples": 53, "layout_replicas": 1}),
    ],
    ids=["c5-indivisible", "c6-small", "c7-remainder"],
)
def test_c5_c6_c7_any_replicas_compute_the_mean_over_the_samples(tmp_path, samples, settings):
    """The weights after the run are those of plain SGD on the same windows, on 1, 2 and 3 replicas, to 1e-6."""
    expected = by_hand(linear(samples), samples=samples, **settings)
    for world_size in (1, 2, 3):
        found = run_replicas(on_replicas, world_size=world_size, args=(tmp_path, samples, settings))[0]
        for name, tensor in expected.items():
            torch.testing.assert_close(torch.tensor(found[name]), tensor, rtol=1e-5, atol=1e-6)
        summary = json.loads((tmp_path / str(world_size) / "summary.json").read_text())
        assert summary["samples_seen"] == settings["max_samples"]


def by_hand(task, *, samples, global_batch_size, max_samples, **_):
    """Plain SGD, one gradient per step over all its samples at once."""
    torch.manual_seed(0)
    task = linear(samples)
    stream = SampleStream(samples, seed=0)
    for start in range(0, max_samples, global_batch_size):
        positions = np.arange(start, min(start + global_batch_size, max_samples))
        batch = [
            torch.stack(column) for column in zip(*(task.train_data[i] for i in stream.indices(positions)), strict=True)
        ]
        task.model.zero_grad()
        squared_error(task.model, batch).backward()
        with torch.no_grad():
            for parameter in task.model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    return {name: tensor.detach() for name, tensor in task.model.named_parameters()}


@pytest.mark.parametrize("samples", [0, 1])
def test_c6_too_few_samples_are_refused(tmp_path, samples):
    """With no sample, or one, which gives no noise estimate: refused in one sentence before anything is trained."""
    with pytest.raises(TaskError, match=f"at least 2 samples, got {samples}"):
        Trainer(plain_sgd(tmp_path), task=lambda: linear(samples))


def test_c8_another_data_set_or_seed_is_refused_with_both_values(whole, tmp_path):
    """Resumed with fewer samples, changed samples or another seed: refused, and the run folder is as it was."""

    def shorter():
        task = noisy()
        return replace(task, train_data=torch.utils.data.Subset(task.train_data, range(89)))

    def changed():
        task = noisy()
        task.train_data.targets[0] += 1
        return task

    before = sorted((path, path.read_bytes()) for path in whole.rglob("*") if path.is_file())
    for task, settings, text in (
        (shorter, {}, "had 90 samples .* has 89 now"),
        (changed, {}, "some of its samples have changed"),
        (noisy, {"seed": 1}, "seed was 0 and is 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            Trainer(make_config(whole, **settings), task=task, resume=True).run()
    assert sorted((path, path.read_bytes()) for path in whole.rglob("*") if path.is_file()) == before


def with_workers(rank, world_size, folder, kill_at):
    with pytest.raises(Killed):
        attempt(folder, kill_at=kill_at, config=make_config(folder, num_workers=0))
    torch.distributed.barrier()
    attempt(folder, config=make_config(folder, num_workers=2))


def test_c9_workers_change_nothing(whole, tmp_path):
    """A run that goes on with two loader workers where it had none ends with the same bytes."""
    run_replicas(with_workers, world_size=2, args=(tmp_path, 9))
    found, expected = result_of(tmp_path), result_of(whole)
    for part in ("parameters", "optimizer", "rows", "decisions", "summary"):
        assert found[part] == expected[part], part


def test_c11_data_without_samples_is_refused(tmp_path):
    """An iterable data set is read in its own order, and one that yields nothing is refused."""

    class Endless(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(TaskError, match="yields no samples"):
        Trainer(plain_sgd(tmp_path), task=lambda: replace(linear(3), train_data=Endless()))


def test_c12_a_trainer_that_is_built_twice_draws_the_same(tmp_path):
    """What happens between seeding and the first step, such as a loader that is built, moves no random number."""
    ends = []
    for name, workers in (("one", 0), ("two", 2)):
        torch.rand(7 if workers else 3)  # the state of the process before does not count
        attempt(tmp_path / name, config=make_config(tmp_path / name, num_workers=workers, max_samples=40))
        ends.append(load_newest(tmp_path / name / "checkpoints").tensors("model"))
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name])


def test_checkpoints_by_the_clock_change_nothing(whole, tmp_path, monkeypatch):
    """Saved at moments that a clock chose, and killed in between, a run ends with the same bytes."""
    monkeypatch.setattr("dptrain.train.checkpoint_schedule._FIRST_S", 0.02)
    config = make_config(tmp_path, layout_replicas=2, checkpoint=CheckpointConfig(hours_between_failures=1e-6))
    with pytest.raises(Killed):
        attempt(tmp_path, config=config, kill_at=17)
    assert load_newest(tmp_path / "checkpoints") is not None
    attempt(tmp_path, config=config)
    assert windows(tmp_path) == windows(whole)
