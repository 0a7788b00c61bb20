"""Too little memory: what is cut, what is tried, and that no sample and no step is lost by it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from dptrain.errors import ConfigError, OutOfMemoryError, TaskError
from dptrain.tasks import Suggestion, Task
from dptrain.tasks.digits import digits
from dptrain.tracking.jsonl import read_rows
from dptrain.train import ControlConfig, Trainer
from dptrain.train.memory import find_micro_batch_size, split
from tests.replicas import run_replicas
from tests.runs import make_config, noisy

CPU = torch.device("cpu")


def enough():
    """Make a task whose loss does not depend on how samples are cut into passes: no dropout."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return Task(**{**vars(noisy()), "model": model})


def small_memory(limit, *, rank=None, from_call=0):
    """Make the same task, whose loss takes at most `limit` samples at once, on one rank or all, from some pass on."""
    task, calls = enough(), iter(range(10**9))

    def loss(model, batch):
        here = rank is None or torch.distributed.get_rank() == rank
        if model.training and here and next(calls) >= from_call and len(batch[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return task.loss(model, batch)

    return Task(**{**vars(task), "loss": loss})


class Counting(nn.Module):
    """Counts its samples in a buffer, and runs out of memory before or after it did so."""

    def __init__(self, limit, *, rank, from_call, counts_first):
        super().__init__()
        self.inner = enough().model
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._limit, self._rank, self._from_call, self._counts_first = limit, rank, from_call, counts_first
        self._calls = 0

    def forward(self, features):
        if not self.training:
            return self.inner(features)
        self._calls += 1
        if self._counts_first:
            self.seen += len(features)
        here = torch.distributed.get_rank() == self._rank and self._calls > self._from_call
        if here and len(features) > self._limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        if not self._counts_first:
            self.seen += len(features)
        return self.inner(features)


def counting(limit=10**9, **settings):
    """Make the task with a model that counts."""
    model = Counting(limit, **{"rank": 1, "from_call": 9, "counts_first": True, **settings})
    return Task(**{**vars(enough()), "model": model})


# Cutting


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 20])
def test_the_parts_make_up_the_micro_batch(parts):
    """Nested tensors are cut alike; joined again they are what they were, in sizes that differ by one at most."""
    batch = {"x": torch.arange(24.0).reshape(8, 3), "y": (torch.arange(8), [torch.rand(8, 1)])}
    pieces = split(batch, parts, num_samples=8)
    assert len(pieces) == min(parts, 8)
    sizes = [len(piece["x"]) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), batch["x"])
    assert torch.equal(torch.cat([piece["y"][1][0] for piece in pieces]), batch["y"][1][0])


@pytest.mark.parametrize(
    "batch",
    [["a", "b"], (torch.rand(3), torch.rand(4)), torch.tensor(1.0), (torch.rand(4, 2), torch.rand(4)), torch.rand(7)],
)
def test_what_has_no_rows_is_not_cut(batch):
    """Cutting a batch whose rows are not known would mix samples; the sentence says what to set."""
    with pytest.raises(TaskError, match="micro_batch_size"):
        split(batch, 2, num_samples=2)


# Finding


@pytest.mark.parametrize(("limit", "found"), [(1, 1), (7, 4), (8, 8), (1000, 16)])
def test_the_largest_that_fits_is_found_by_trying(limit, found):
    """The largest power of two up to the top, and the model afterwards is what it was before."""
    task = small_memory(limit)
    state = {name: value.clone() for name, value in task.model.state_dict().items()}
    random = torch.get_rng_state()
    size = find_micro_batch_size(task, largest=16, device=CPU, num_states=2, precision=nullcontext)
    assert size == found
    assert all(torch.equal(value, state[name]) for name, value in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_running_means_do_not_see_the_trial():
    """A batch norm's buffers are put back."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    task = Task(
        name="normed",
        model=model,
        train_data=[torch.rand(3) for _ in range(8)],
        loss=lambda model, batch: model(batch if len(batch) > 1 else batch.repeat(2, 1)).mean(),
        suggestion=Suggestion(
            learning_rate=0.1, global_batch_size=4, micro_batch_size=4, max_samples=8, eval_every_samples=8
        ),
    )
    before = model[1].running_mean.clone()
    assert find_micro_batch_size(task, largest=8, device=CPU, num_states=1, precision=nullcontext) == 8
    assert torch.equal(model[1].running_mean, before)


def test_no_memory_for_one_sample_is_an_error():
    """There is nothing smaller to try."""
    with pytest.raises(OutOfMemoryError, match="single sample"):
        find_micro_batch_size(small_memory(0), largest=4, device=CPU, num_states=2, precision=nullcontext)


def find_on_ranks(rank, world_size):
    limit = [8, 3][rank]
    return find_micro_batch_size(small_memory(limit), largest=16, device=CPU, num_states=2, precision=nullcontext)


def test_the_replica_with_the_least_memory_decides():
    """All replicas agree on what fits on each."""
    assert run_replicas(find_on_ranks, world_size=2) == [2, 2]


def test_auto_trains_and_is_written_down(tmp_path):
    """A run with micro_batch_size=auto has a number in its settings."""
    trainer = Trainer(make_config(tmp_path / "run", micro_batch_size="auto", max_samples=24), task=digits)
    trainer.run()
    assert trainer._config.micro_batch_size == digits().suggestion.micro_batch_size
    assert f"micro_batch_size: {trainer._config.micro_batch_size}" in (tmp_path / "run" / "config.yaml").read_text()


# In the middle of a run


def train_with_little(rank, world_size, folder):
    """Train without an error, with one on all ranks, and with one on rank 1 alone, late."""
    found = {}
    tasks = {"enough": enough, "all": lambda: small_memory(2), "late": lambda: small_memory(2, rank=1, from_call=9)}
    for name, task in tasks.items():
        settings = {"control": ControlConfig(law="constant"), "global_batch_size": 16, "micro_batch_size": 4}
        trainer = Trainer(make_config(f"{folder}/{name}", max_samples=160, **settings), task=task)
        summary = trainer.run()
        parameters = torch.cat([p.detach().flatten() for p in trainer._bare_model.parameters()]).tolist()
        found[name] = parameters, summary
    return found


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    folder = tmp_path_factory.mktemp("little")
    return folder, run_replicas(train_with_little, world_size=2, args=(str(folder),))


@pytest.mark.parametrize("name", ["all", "late"])
def test_too_little_memory_costs_no_step_and_no_sample(little, name):
    """Steps, samples and batches are those of a run with enough; the parameters are equal but for rounding."""
    folder, ranks = little
    for found in ranks:
        assert found[name][1] is None or found[name][1]["steps"] == found["enough"][1]["steps"] == 10
        assert found[name][0] == pytest.approx(found["enough"][0], rel=1e-5, abs=1e-6)
    assert ranks[0][name][0] == ranks[1][name][0]
    enough, reported = (read_rows(folder / run / "metrics.jsonl") for run in ("enough", name))
    for one, other in zip(enough, reported, strict=True):
        if one["kind"] == "train":
            assert (one["progress/samples"], one["batch/global"]) == (other["progress/samples"], other["batch/global"])
            assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["all", "late"])
def test_smaller_micro_batches_follow_on_all_replicas(little, name):
    """Once it happened on any replica, all take micro-batches that fit, and the accumulation makes up for it."""
    folder, _ = little
    rows = [row for row in read_rows(folder / name / "metrics.jsonl") if row["kind"] == "train"]
    assert (rows[0]["batch/micro"], rows[0]["batch/accumulation"]) == (4, 2)
    assert (rows[-1]["batch/micro"], rows[-1]["batch/accumulation"]) == (2, 4)


def test_the_noise_scale_survives_it(little):
    """A step whose micro-batches were halved on one replica is measured with the sizes that it had."""
    folder, _ = little
    last = {name: read_rows(folder / name / "metrics.jsonl")[-2] for name in ("enough", "late")}
    assert last["late"]["noise_scale/trace"] == pytest.approx(last["enough"]["noise_scale/trace"], rel=0.5)


def train_and_count(rank, world_size, folder):
    """Train with a rank short of memory in its forward pass, in the first one of a step and in the last."""
    found = {}
    tasks = {
        "enough": counting,
        "first": lambda: counting(2, from_call=10),
        "last": lambda: counting(2, from_call=9),
        "before it counts": lambda: counting(2, counts_first=False),
        "rank 0": lambda: counting(2, rank=0),
    }
    for name, task in tasks.items():
        settings = {"control": ControlConfig(law="constant"), "global_batch_size": 16, "micro_batch_size": 4}
        trainer = Trainer(make_config(f"{folder}/{name}", max_samples=160, **settings), task=task)
        trainer.run()
        model = trainer._bare_model
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(), int(model.seen)
    return found


def test_a_step_begun_anew_leaves_no_trace_in_buffers(tmp_path):
    """Nor do the other replicas wait: a buffer that the model changes has rank 0's value before each step."""
    for found in run_replicas(train_and_count, world_size=2, args=(str(tmp_path),)):
        parameters, seen = found["enough"]
        assert seen == 160 / 2  # 8 samples a step on each replica, and of the other's none
        for name in found:
            assert found[name][0] == pytest.approx(parameters, rel=1e-5, abs=1e-6), name
            assert found[name][1] == seen, name


def train_synchronised(rank, world_size, folder):
    settings = {"global_batch_size": 16, "micro_batch_size": 4, "control": ControlConfig(law="constant")}
    task = lambda: small_memory(2, rank=1, from_call=9)  # noqa: E731 - built by the trainer
    trainer = Trainer(make_config(folder, max_samples=160, **settings), task=task)
    trainer._bare_model[1].norm = nn.SyncBatchNorm(1, affine=False)  # only now, as DDP takes none on a CPU
    trainer.run()


def test_a_step_with_sync_batch_norm_is_not_begun_anew_by_one_replica(tmp_path):
    """The others would take part in another number of its forward passes: a sentence, and nobody waits for ever."""
    with pytest.raises(AssertionError, match=r"OutOfMemoryError: .*SyncBatchNorm .*--micro-batch-size 2"):
        run_replicas(train_synchronised, world_size=2, args=(str(tmp_path / "run"),))


def test_what_cannot_be_halved_ends_the_run(tmp_path):
    """Not even one sample fits: an error, not an endless loop."""
    trainer = Trainer(make_config(tmp_path / "run", max_samples=24), task=lambda: small_memory(0, from_call=2))
    with pytest.raises(OutOfMemoryError, match="single sample"):
        trainer.run()


def test_a_micro_batch_of_nothing_is_refused():
    """Neither 0 nor a word other than auto is a size."""
    for size in (0, "all"):
        with pytest.raises(ConfigError, match="micro_batch_size"):
            make_config("run", micro_batch_size=size)
