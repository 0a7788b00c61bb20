"""`BatchAdapter`: the windows that every loop shares, and its decisions beside the trainer's."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.control.settings import ControlConfig
from dptrain.data import MicroBatchLoader, SampleStream
from dptrain.errors import CheckpointError, ConfigError
from dptrain.integrations.batch_adapter import BatchAdapter
from dptrain.noise.scale import noise_scale
from dptrain.tracking.jsonl import read_rows
from tests.regression import build
from tests.replicas import run_replicas

UNKNOWN = noise_scale(None)
SCHEDULED = ControlConfig(law="schedule", schedule="0:16 32:32 64:64")


def adapter(*, world_size=2, accumulation_steps=2, **settings):
    """An adapter without a model: what it needs of a meter is the number of replicas."""
    meter = SimpleNamespace(num_replicas=world_size, on_remove=lambda _: None)
    options = {"control": SCHEDULED, "rule": "linear", **settings}
    return BatchAdapter(meter, None, micro_batch_size=4, accumulation_steps=accumulation_steps, **options)


def decide(adaptive, **options):
    adaptive.note(UNKNOWN)
    return adaptive.decide(**options)


def test_windows_follow_the_law_and_the_rate_follows_the_windows():
    """A decision counts the steps whose outcome is known, so it comes one step after the position of the schedule."""
    adaptive = adapter()
    windows = [decide(adaptive) for _ in range(6)]
    assert [window.accumulation_steps for window in windows] == [2, 2, 4, 4, 8, 8]
    assert [window.learning_rate_factor for window in windows] == [1, 1, 2, 2, 4, 4]
    assert adaptive.as_metrics()["batch/num_changes"] == 2
    assert adaptive.as_metrics()["progress/samples"] == 8 * (2 + 2 + 2 + 4 + 4 + 8)


@pytest.mark.parametrize("meter", [None, torch.nn.Linear(2, 2), SimpleNamespace(num_replicas=2)])
def test_what_is_no_meter_is_refused(meter):
    """A model in the place of the meter is answered by what makes one."""
    with pytest.raises(ConfigError, match=r"what dptrain\.attach\(model\) returns"):
        BatchAdapter(meter, None, micro_batch_size=4)


def test_an_optimizer_that_takes_no_hooks_is_refused():
    """Its rate could not follow the batch; the remedy is to multiply it oneself."""
    meter = SimpleNamespace(num_replicas=2, on_remove=lambda _: None)
    with pytest.raises(ConfigError, match=r"adapter\.learning_rate_factor"):
        BatchAdapter(meter, [torch.optim.SGD], micro_batch_size=4)


def test_the_state_goes_through_json_and_on():
    """A restored adapter decides as the whole one does."""
    whole, first, second = adapter(), adapter(), adapter()
    for _ in range(3):
        decide(whole)
        decide(first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.window == first.window
    assert decide(whole) == decide(second)
    assert whole.state_dict() == second.state_dict()


def test_on_other_replicas_the_batch_is_kept():
    """A batch of 32 is four micro-batches of 4 on two replicas and two on four; on three it is refused."""
    adaptive = adapter()
    for _ in range(3):
        decide(adaptive)
    wider = adapter(world_size=4, accumulation_steps=1)
    wider.load_state_dict(adaptive.state_dict())
    assert (wider.global_batch_size, wider.accumulation_steps) == (32, 2)
    other = adapter(world_size=3, control=ControlConfig(law="noise"))
    with pytest.raises(CheckpointError, match="multiple of micro-batch × world size = 12"):
        other.load_state_dict({**adaptive.state_dict(), "controller": other.state_dict()["controller"]})


@pytest.mark.parametrize("law", ["noise", "constant"])
@pytest.mark.parametrize("rule", ["gain", "root_gain", "linear"])
def test_on_other_replicas_rate_and_limits_are_those_of_the_first_step(law, rule):
    """From 2 to 4 replicas and back the batch that the rate was tuned at stays; limits by default stay with it."""
    options = {"control": ControlConfig(law=law), "rule": rule, "max_samples": 100_000}
    adaptive = adapter(accumulation_steps=4, **options)
    for _ in range(3):
        decide(adaptive)
    first = adaptive.window.learning_rate_factor, adaptive.global_batch_size, limits_of(adaptive)
    assert first[:2] == (1.0, 32)
    for world_size in (4, 2):
        resumed = adapter(world_size=world_size, accumulation_steps=4, **options)
        resumed.load_state_dict(json.loads(json.dumps(adaptive.state_dict())))
        for _ in range(3):
            window = decide(resumed)
        assert (window.learning_rate_factor, resumed.global_batch_size, limits_of(resumed)) == first
        assert resumed.reference_batch_size == 32
        adaptive = resumed


def limits_of(adaptive):
    return adaptive._config.control.smallest, adaptive._config.control.largest


def test_limits_that_are_given_hold_where_a_run_goes_on():
    """A largest batch of the loop that resumes takes the place of the one by default."""
    adaptive = adapter(control=ControlConfig(law="noise"))
    decide(adaptive)
    wider = adapter(world_size=4, control=ControlConfig(law="noise", largest=64))
    wider.load_state_dict(adaptive.state_dict())
    assert limits_of(wider) == (8, 64)


def test_a_state_of_an_earlier_version_goes_on_from_the_batch_of_the_loop():
    """It does not say where the run began; the first step of the loop that resumes is the best guess."""
    adaptive = adapter()
    decide(adaptive)
    record = adaptive.state_dict()
    del record["first_step"]
    wider = adapter(world_size=4)
    wider.load_state_dict(record)
    assert (wider.reference_batch_size, wider.global_batch_size) == (32, 16)


def test_refuses_what_is_not_a_setting_or_a_state():
    """An unknown rule and a foreign record are named."""
    with pytest.raises(ConfigError, match="linear"):
        adapter(rule="cubic")
    with pytest.raises(CheckpointError, match="window"):
        adapter().load_state_dict({"meter": {}})


# Beside the trainer: the same task, the same samples, the same law

NOISE = ControlConfig(law="noise", largest=128)
NUM_STEPS, MICRO = 40, 4


def train_both(rank, world_size, folder):
    """Train the regression by the trainer, and by a plain DDP loop over the same samples; return both's batches."""
    settings = {
        "device": "cpu",
        "run_dir": f"{folder}/run",
        "global_batch_size": 16,
        "micro_batch_size": MICRO,
        "max_samples": 4000,
        "control": NOISE,
        "optimizer": dptrain.OptimizerConfig(
            name="sgd",
            learning_rate=0.02,
            schedule="constant",
            warmup_samples=0,
            beta1=0.0,
            max_grad_norm=None,
            weight_decay=0.0,
        ),
        "log": dptrain.LogConfig(tracker="none"),
    }
    trainer = dptrain.Trainer(dptrain.TrainConfig(**settings), task=build)
    trainer.run()
    torch.manual_seed(0)
    task = build()
    model = DistributedDataParallel(task.model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    meter = dptrain.attach(model, every=1, population=len(task.train_data))
    adaptive = BatchAdapter(
        meter, optimizer, micro_batch_size=MICRO, accumulation_steps=2, control=NOISE, max_samples=4000
    )
    stream = SampleStream(len(task.train_data), seed=0)
    loader = MicroBatchLoader(task.train_data, stream=stream, rank=rank, world_size=world_size)
    position, batches = 0, []
    while position < 4000:
        batch = min(adaptive.global_batch_size, 4000 - position)
        batches.append(adaptive.global_batch_size)
        if batch < adaptive.global_batch_size:
            break
        steps = adaptive.accumulation_steps
        window = loader.window(position=position, global_batch_size=batch, micro_batch_size=MICRO)
        for number, micro_batch in enumerate(window, start=1):
            with nullcontext() if number == steps else model.no_sync():
                (task.loss(model, micro_batch.batch) / steps).backward()
        adaptive.step()
        optimizer.step()
        optimizer.zero_grad()
        position += batch
    rows = read_rows(f"{folder}/run/metrics.jsonl") if rank == 0 else []
    return {
        "loop": batches,
        "trainer": [row["batch/global"] for row in rows if row["kind"] == "train"],
        "rates": [row["train/lr"] for row in rows if row["kind"] == "train"],
    }


def test_a_plain_loop_decides_as_the_trainer_does(tmp_path):
    """Under a law that reads no clock, a plain DDP loop has the batches of `dptrain train` at every step."""
    first, second = run_replicas(train_both, world_size=2, args=(str(tmp_path),))
    assert first["loop"] == second["loop"]
    whole = len(first["loop"]) - 1  # the trainer's last step is what is left of the run
    assert len(set(first["loop"])) > 2
    assert first["loop"][:whole] == first["trainer"][:whole]


def test_under_goodput_a_loop_times_its_own_steps():
    """After a few steps the law knows the time of a step, the same on both replicas."""
    first, second = run_replicas(time_steps, world_size=2)
    assert first == second
    assert first["shapes"] >= 1
    assert first["seconds"] > 0


def time_steps(rank, world_size):
    model = DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    adaptive = BatchAdapter(dptrain.attach(model, every=1), optimizer, micro_batch_size=4, accumulation_steps=2)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        for number in range(adaptive.accumulation_steps):
            with nullcontext() if number == adaptive.accumulation_steps - 1 else model.no_sync():
                (model(torch.randn(4, 8, generator=generator)).square().mean() / adaptive.accumulation_steps).backward()
        adaptive.step()
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    shapes = adaptive.state_dict()["step_times"]["shapes"]
    return {"shapes": len(shapes), "seconds": shapes[0]["seconds"][0]}
