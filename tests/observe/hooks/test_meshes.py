"""Loops that average gradients in other ways than DDP and FSDP2 do: the pair of plain gradients, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise import PresentState, SquaredNorms, present_moments, present_updated, unbiased_moments
from tests.observe.plain import MICRO, make_model, mean_loss, micro_batch, pair, sq_norm, trained, whole
from tests.replicas import run_replicas

STEPS, ACCUMULATION = 3, 2


class Truth:
    """Plain gradients of all replicas' micro-batches at the loop's own parameters, step by step."""

    def __init__(
        self, num_replicas, loss_of=mean_loss, make=make_model, batch_of=micro_batch, accumulation=ACCUMULATION
    ):
        self.num_replicas, self.loss_of, self.make, self.batch_of = num_replicas, loss_of, make, batch_of
        self.accumulation = accumulation
        self.present = PresentState()

    def add(self, parameters, step):
        model = self.make()
        with torch.no_grad():
            for p, value in zip(model.parameters(), parameters, strict=True):
                p.copy_(value)
        gradients = []
        for replica in range(self.num_replicas):
            for micro_step in range(self.accumulation):
                loss = self.loss_of(model, *self.batch_of(step, micro_step, replica))
                gradients.append([g.double() for g in torch.autograd.grad(loss, trained(model))])
        mean = [sum(parts) / len(gradients) for parts in zip(*gradients, strict=True)]
        norms = SquaredNorms.of(
            [sq_norm(g) for g in gradients], sizes=[MICRO] * len(gradients), large_sq_norm=sq_norm(mean)
        )
        self.present = present_updated(self.present, unbiased_moments(norms))

    def pair(self):
        return pair(present_moments(self.present))


def values(model):
    return [whole(p.detach()).clone() for p in model.parameters()]


def orthogonal(matrix):
    """Newton–Schulz, as Muon does."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class MuonAndAdam(torch.optim.Optimizer):
    """Averages inside its step, as nanochat's: matrices on an owner each, the rest in shards by reduce-scatter."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.02})

    @torch.no_grad()
    def step(self):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        for number, p in enumerate(self.param_groups[0]["params"]):
            if p.dim() == 2:
                self._step_matrix(p, owner=number % world_size, rank=rank, world_size=world_size)
            else:
                self._step_shard(p, world_size=world_size)

    def _step_matrix(self, p, *, owner, rank, world_size):
        grad = p.grad.clone()
        dist.reduce(grad, owner)
        if rank == owner:
            p.sub_(0.02 * orthogonal(grad / world_size))
        dist.broadcast(p, owner)

    def _step_shard(self, p, *, world_size):
        piece = -(-p.numel() // world_size)
        padded = torch.nn.functional.pad(p.grad.flatten(), (0, piece * world_size - p.numel()))
        shard = torch.empty(piece)
        dist.reduce_scatter_tensor(shard, padded)
        shard /= world_size
        state = self.state[p]
        state["second"] = 0.95 * state.get("second", torch.zeros(piece)) + 0.05 * shard.square()
        gathered = torch.empty(piece * world_size)
        dist.all_gather_into_tensor(gathered, 0.02 * shard / (state["second"].sqrt() + 1e-8))
        p.sub_(gathered[: p.numel()].view_as(p))


def muon_loop(rank, *, measured, by_optimizer, every=1):
    """Train; return (parameters, meter, truth)."""
    world_size = dist.get_world_size()
    model, truth = make_model(), Truth(world_size)
    optimizer = MuonAndAdam(trained(model))
    meter = None
    if measured:
        closing = {"optimizer": optimizer} if by_optimizer else {}
        meter = dptrain.attach(model, reduction="optimizer", every=every, **closing)
    for step in range(STEPS):
        if measured:
            truth.add(values(model), step)
        for micro_step in range(ACCUMULATION):
            (mean_loss(model, *micro_batch(step, micro_step, rank)) / ACCUMULATION).backward()
        if measured and not by_optimizer:
            meter.step()
        optimizer.step()
        model.zero_grad()
    return values(model), meter, truth


def muon(rank, world_size):
    bare, _, _ = muon_loop(rank, measured=False, by_optimizer=False)
    found = []
    for by_optimizer in (False, True):
        parameters, meter, truth = muon_loop(rank, measured=True, by_optimizer=by_optimizer)
        same = all(map(torch.equal, bare, parameters))
        found.append((pair(meter.read()), truth.pair(), same, meter.steps_dropped))
    with pytest.raises(ObservationError, match="leave `reduction` out"):
        dptrain.attach(DistributedDataParallel(make_model()), reduction="optimizer")
    with pytest.raises(ObservationError, match="reduction='optimizer'"):
        dptrain.attach(make_model())
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_loop_that_averages_inside_its_optimizer(world_size):
    """Muon and Adam by owners and shards: local gradients against the mean that is never whole, closed either way."""
    results = run_replicas(muon, world_size=world_size)
    for found, expected, same, dropped in results[0]:
        assert found == pytest.approx(expected, rel=1e-4)
        assert same
        assert dropped == 0
    assert all(result == results[0] for result in results)


class Parallel(nn.Module):
    """Two layers that tensor parallelism cuts by columns and by rows, and a layer norm that it does not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        return self.down(torch.relu(self.up(self.norm(x))))


def make_parallel():
    torch.manual_seed(3)
    return Parallel()


def tensor_parallel(*, norm):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if norm == "sequence":
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(),
        }
    model = parallelize_module(make_parallel(), mesh["tensor"], plan)
    if norm == "sequence":
        parallelize_module(
            model, mesh["tensor"], PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(0))
        )
    return fully_shard(model, mesh=mesh["data"])


def even_batch(step, micro_step, rank):
    return micro_batch(step, micro_step, rank, size=MICRO + 1)


def mesh_loop(replica, model, *, meter=None, truth=None, scale=1.0, batch_of=micro_batch):
    optimizer = torch.optim.SGD(trained(model), lr=0.05, foreach=False)
    for step in range(STEPS):
        if truth is not None:
            truth.add(values(model), step)
        for micro_step in range(ACCUMULATION):
            (mean_loss(model, *batch_of(step, micro_step, replica)) / ACCUMULATION * scale).backward()
        if meter is not None:
            meter.step()
        optimizer.step()
        model.zero_grad()
    return values(model)


def meshes(rank, world_size):
    found = {}
    # A sequence cut in two needs an even number of rows. The size is told as for the truth: only its ratio matters.
    for norm, batch_of in (("plain", micro_batch), ("sequence", even_batch)):
        bare = mesh_loop(rank // 2, tensor_parallel(norm=norm), batch_of=batch_of)
        model, truth = tensor_parallel(norm=norm), Truth(2, make=make_parallel, batch_of=batch_of)
        meter = dptrain.attach(model, every=1, micro_batch_size=MICRO)
        measured = mesh_loop(rank // 2, model, meter=meter, truth=truth, batch_of=batch_of)
        found[norm] = (pair(meter.read()), truth.pair(), all(map(torch.equal, bare, measured)), meter.steps_dropped)
        assert meter.num_replicas == 2
    return found


def test_a_mesh_with_tensor_parallelism_is_measured_over_its_data_dimension():
    """On 2 × 2 ranks, with a layer norm whole on each rank or cut along the sequence, replicas are what is compared."""
    results = run_replicas(meshes, world_size=4)
    for norm, (found, expected, same, dropped) in results[0].items():
        assert found == pytest.approx(expected, rel=1e-4), norm
        assert same, norm
        assert dropped == 0, norm
    assert all(result == results[0] for result in results)


def factored(rank, world_size):
    """FSDP2 that sums, as torchtitan's, whose loss is divided by the global count instead."""
    from torch.distributed.fsdp import fully_shard

    def build():
        model = fully_shard(make_model())
        model.set_gradient_divide_factor(1.0)
        model.set_force_sum_reduction_for_comms(True)
        return model

    bare = mesh_loop(rank, build(), scale=1 / world_size)
    model, truth = build(), Truth(world_size)
    meter = dptrain.attach(model, every=1, loss_scale=lambda: 1 / world_size)
    measured = mesh_loop(rank, model, meter=meter, truth=truth, scale=1 / world_size)
    found = pair(meter.read()), truth.pair(), all(map(torch.equal, bare, measured)), meter.steps_dropped
    two = nn.Sequential(fully_shard(nn.Linear(8, 8)), nn.Linear(8, 8))
    fully_shard(two)[0].set_gradient_divide_factor(3.0)
    with pytest.raises(ObservationError, match="different factors"):
        dptrain.attach(two)
    return found


def test_fsdp_may_sum_in_place_of_averaging():
    """A divide factor of 1 is carried; modules with different factors are refused."""
    for found, expected, same, dropped in run_replicas(factored, world_size=2):
        assert found == pytest.approx(expected, rel=1e-4)
        assert same
        assert dropped == 0


def fabric_loop(rank, world_size):
    """Lightning Fabric's module, set up on the process group that is there."""
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.wrappers import _FabricModule

    def build():
        ddp = DistributedDataParallel(make_model())
        return _FabricModule(ddp, strategy=DDPStrategy(), original_module=ddp.module)

    bare = mesh_loop(rank, build())
    model, truth = build(), Truth(world_size)
    meter = dptrain.attach(model, every=1)
    measured = mesh_loop(rank, model, meter=meter, truth=truth)
    return pair(meter.read()), truth.pair(), all(map(torch.equal, bare, measured)), meter.steps_dropped


def test_fabrics_module_is_looked_into():
    """What `fabric.setup` returns is a wrapper round DDP."""
    for found, expected, same, dropped in run_replicas(fabric_loop, world_size=2):
        assert found == pytest.approx(expected, rel=1e-4)
        assert same
        assert dropped == 0


def refused_engines(rank, world_size):
    """Engines that keep their gradients to themselves are refused with what to do."""
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = make_model()
    with pytest.raises(ObservationError, match="Observer"):
        dptrain.attach(engine)
    megatron = type("DistributedDataParallel", (nn.Module,), {"__module__": "megatron.core.distributed"})()
    megatron.module = copy.deepcopy(make_model())
    with pytest.raises(ObservationError, match="main_grad"):
        dptrain.attach(megatron)
    return True


def test_engines_with_gradients_of_their_own_are_refused():
    """DeepSpeed's and Megatron's wrappers leave no `.grad`: the error names the Observer."""
    assert all(run_replicas(refused_engines, world_size=2))
