"""`BatchAdapter` with every kind of exchange, in a loop of one's own on two replicas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dptrain
from dptrain.control.settings import ControlConfig
from dptrain.errors import ConfigError, ObservationError
from dptrain.exchange import AllReduce, Compressed, Ensemble, LocalUpdates, RandomBases
from tests.replicas import run_replicas

SCHEDULE = ControlConfig(law="schedule", schedule="0:8 80:16")
KINDS = {
    "all_reduce": (AllReduce, ControlConfig(law="noise", largest=64), None),
    "int8": (lambda: Compressed("int8"), ControlConfig(law="noise", largest=64), None),
    "random_bases": (lambda: RandomBases(8), SCHEDULE, "square_root"),
    "local": (lambda: LocalUpdates(5), SCHEDULE, "square_root"),
    "ensemble": (Ensemble, SCHEDULE, "none"),
}


def train(rank, make, control, rule, *, num_steps=20):
    torch.manual_seed(rank)
    model = nn.Linear(6, 2)
    exchange = make()
    wrapped = exchange.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = None
    if exchange.no_noise_scale is None:
        meter = dptrain.attach(wrapped, every=1)
    else:
        with pytest.raises(ObservationError, match="there is no noise scale here"):
            dptrain.attach(wrapped)
    adapter = dptrain.BatchAdapter(meter, optimizer, micro_batch_size=4, control=control, rule=rule, exchange=exchange)
    generator = torch.Generator().manual_seed(rank)
    batches, differ = [], []
    for _ in range(num_steps):
        batches.append(adapter.global_batch_size)
        for _ in range(adapter.accumulation_steps):
            x = torch.randn(4, 6, generator=generator)
            y = x[:, :2] + torch.randn(4, 2, generator=generator)
            ((wrapped(x) - y).square().mean() / adapter.accumulation_steps).backward()
        adapter.step()
        optimizer.step()
        optimizer.zero_grad()
        differ.append(exchange.may_differ)
    adapter.meter.remove()
    return {"batches": batches, "differ": differ, "parameters": model.weight.flatten().tolist()}


def train_all(rank, world_size):
    return {name: train(rank, *arguments) for name, arguments in KINDS.items()}


@pytest.fixture(scope="module")
def runs():
    return run_replicas(train_all, world_size=2, timeout_s=240)


def test_replicas_come_to_the_same_batches(runs):
    """By the noise scale under exact and rounded gradients, and by the schedule under all others."""
    one, two = runs
    for name in KINDS:
        assert one[name]["batches"] == two[name]["batches"]
    for name in ("random_bases", "local", "ensemble"):
        assert one[name]["batches"] == [8] * 11 + [16] * 9
    assert one["all_reduce"]["batches"][-1] > 8
    assert one["int8"]["batches"][-1] > 8


def test_the_batch_changes_while_replicas_differ(runs):
    """Local updates exchange after steps 5, 10, …, whatever the batch is; members of an ensemble never do."""
    one, two = runs
    assert [step for step, differ in enumerate(one["local"]["differ"], 1) if not differ] == [5, 10, 15, 20]
    assert one["local"]["parameters"] == two["local"]["parameters"]
    assert one["random_bases"]["parameters"] == two["random_bases"]["parameters"]
    assert one["ensemble"]["parameters"] != two["ensemble"]["parameters"]


def test_what_cannot_be_is_refused_with_the_reason():
    """A law that reads the noise scale, a rule that does, and a missing meter."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = LocalUpdates()
    local.wrap(model)
    with pytest.raises(ConfigError, match=r"law=goodput needs the noise scale.*parameters of their own"):
        dptrain.BatchAdapter(None, optimizer, micro_batch_size=4, exchange=local)
    with pytest.raises(ConfigError, match="rule=square_root"):
        dptrain.BatchAdapter(None, optimizer, micro_batch_size=4, control=SCHEDULE, exchange=local)
    with pytest.raises(ConfigError, match=r"dptrain\.attach"):
        dptrain.BatchAdapter(None, optimizer, micro_batch_size=4)
