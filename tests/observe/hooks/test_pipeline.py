"""A model in pipeline stages × replicas: the meter adds the stages up and equals a process that holds the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise import PresentState, SquaredNorms, present_moments, present_updated, unbiased_moments
from tests.observe.plain import pair, sq_norm
from tests.replicas import run_replicas

STEPS, MICRO, RATE = 3, 5, 0.05
NUM_MICRO_BATCHES = 4  # of each replica: in 1F1B the first stage is then one forward pass ahead


REFUSED = [
    ({"num_stages": 2}, "4 ranks over 2 stages"),  # in DDP over all ranks, which then hold the same
    ({"num_stages": 0}, "at least 1, got 0"),
]


def make_stages():
    torch.manual_seed(1)
    first = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12))
    return first, nn.Sequential(nn.Tanh(), nn.Linear(12, 2))


def samples(step, replica):
    """All micro-batches of one replica."""
    generator = torch.Generator().manual_seed(100 * step + replica)
    size = MICRO * NUM_MICRO_BATCHES
    return torch.randn(size, 8, generator=generator), torch.randn(size, 2, generator=generator)


def mean_loss(output, target):
    return ((output - target) ** 2).sum(1).mean()


def reference(num_replicas):
    """(tr(Σ), |G|²) along the path of plain gradients of the whole model in one process."""
    model = nn.Sequential(*make_stages())
    parameters, present = list(model.parameters()), PresentState()
    for step in range(STEPS):
        gradients = []
        for replica in range(num_replicas):
            x, y = samples(step, replica)
            for inputs, targets in zip(x.split(MICRO), y.split(MICRO), strict=True):
                found = torch.autograd.grad(mean_loss(model(inputs), targets), parameters)
                gradients.append([g.double() for g in found])
        mean = [sum(own) / len(gradients) for own in zip(*gradients, strict=True)]
        norms = SquaredNorms.of(
            [sq_norm(g) for g in gradients], sizes=[MICRO] * len(gradients), large_sq_norm=sq_norm(mean)
        )
        present = present_updated(present, unbiased_moments(norms))
        with torch.no_grad():
            for p, g in zip(parameters, mean, strict=True):
                p.sub_((RATE * g).float())
    return pair(present_moments(present))


def put_on(rank):
    """The pipeline stage of this rank, in DDP over its replicas, and the number of both."""
    from torch.distributed.pipelining import PipelineStage

    replica, number = divmod(rank, 2)
    groups = {
        name: [dist.new_group(ranks) for ranks in both]
        for name, both in {"stages": [[0, 1], [2, 3]], "replicas": [[0, 2], [1, 3]]}.items()
    }
    module = DistributedDataParallel(make_stages()[number], process_group=groups["replicas"][number])
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=groups["stages"][replica])
    return module, stage, replica, number


def train(rank, *, scales_grads, **attached):
    """Train two stages on two replicas by 1F1B; return the parameters, and what a meter read."""
    from torch.distributed.pipelining import Schedule1F1B

    module, stage, replica, number = put_on(rank)
    factor = 1 if scales_grads else NUM_MICRO_BATCHES
    schedule = Schedule1F1B(
        stage,
        n_microbatches=NUM_MICRO_BATCHES,
        loss_fn=lambda output, target: mean_loss(output, target) / factor,
        scale_grads=scales_grads,
    )
    meter = dptrain.attach(module, every=1, **attached) if attached else None
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    for step in range(STEPS):
        x, y = samples(step, replica)
        schedule.step(*((x,) if number == 0 else ()), target=y if number == 1 else None)
        if meter is not None:
            meter.step()
        optimizer.step()
        optimizer.zero_grad()
    parameters = [p.detach().clone() for p in module.parameters()]
    if meter is None:
        return parameters, None
    found = {"pair": pair(meter.read()), "dropped": meter.steps_dropped, "replicas": meter.num_replicas}
    meter.remove()
    return parameters, found


def adapted(rank):
    """The number of micro-batches of each step, by `BatchAdapter`."""
    from torch.distributed.pipelining import Schedule1F1B

    module, stage, replica, number = put_on(rank)
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    meter = dptrain.attach(module, every=1, num_stages=2)
    control = dptrain.ControlConfig(law="noise", min_gain=0.0, largest=16 * MICRO)
    # Not fewer in the first step: DDP must see a forward pass between its first two backward passes.
    adapter = dptrain.BatchAdapter(
        meter, optimizer, micro_batch_size=MICRO, accumulation_steps=4, control=control, rule="none"
    )
    counts, schedules = [], {}
    for step in range(30):
        counts.append(count := adapter.accumulation_steps)
        if count not in schedules:
            schedules[count] = Schedule1F1B(
                stage, n_microbatches=count, loss_fn=lambda a, b, n=count: mean_loss(a, b) / n, scale_grads=False
            )
        x, y = (torch.cat([samples(100 * step + k, replica)[i] for k in range(4)])[: count * MICRO] for i in (0, 1))
        schedules[count].step(*((x,) if number == 0 else ()), target=y if number == 1 else None)
        adapter.step()
        optimizer.step()
        optimizer.zero_grad()
    dropped = meter.steps_dropped
    meter.remove()
    return {"counts": counts, "dropped": dropped}


def all_ways(rank, world_size):
    bare, _ = train(rank, scales_grads=False)
    ways = {
        "loss divided": {"scales_grads": False, "num_stages": 2},
        "as they come": {"scales_grads": True, "num_stages": 2},
        "gradients divided": {"scales_grads": True, "num_stages": 2, "loss_scale": lambda: float(NUM_MICRO_BATCHES)},
    }
    found = {}
    for name, way in ways.items():
        parameters, read = train(rank, **way)
        found[name] = {**read, "same": all(map(torch.equal, bare, parameters))}
    found["adapted"] = adapted(rank)
    module = DistributedDataParallel(make_stages()[0])
    for options, message in REFUSED:
        with pytest.raises(ObservationError, match=message):
            dptrain.attach(module, **options)
    return found


@pytest.fixture(scope="module")
def runs():
    return run_replicas(all_ways, world_size=4)


@pytest.mark.parametrize("way", ["loss divided", "gradients divided"])
def test_stages_and_replicas_equal_one_process(runs, way):
    """1F1B on 2 × 2 processes, whose passes interleave: to 1e-4 of plain gradients, and training does not notice."""
    expected = reference(2)
    for run in runs:
        assert run[way]["pair"] == pytest.approx(expected, rel=1e-4)
        assert run[way]["pair"] == runs[0][way]["pair"]
        assert run[way]["dropped"] == 0
        assert run[way]["replicas"] == 2
        assert run[way]["same"]


def test_gradients_that_are_divided_later_leave_the_noise_scale_alone(runs):
    """Without `loss_scale` both moments have the square of the number of micro-batches, and their ratio has not."""
    trace, grad = reference(2)
    factor = NUM_MICRO_BATCHES**2
    assert runs[0]["as they come"]["pair"] == pytest.approx((factor * trace, factor * grad), rel=1e-4)


def test_the_batch_follows_by_the_number_of_micro_batches(runs):
    """`BatchAdapter` counts two replicas, not four ranks, and comes to the same schedule on every stage."""
    counts = runs[0]["adapted"]["counts"]
    assert all(run["adapted"] == runs[0]["adapted"] for run in runs)
    assert runs[0]["adapted"]["dropped"] == 0
    assert counts[0] == 4
    assert max(counts) == 8  # 16 micro-batches in all, on two replicas
