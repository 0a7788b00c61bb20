"""Every wrapper against gradients of a plain model: the same noise scale, and not one bit of the training changed."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise import PresentState, SquaredNorms, noise_scale, present_moments, present_updated, unbiased_moments
from tests.observe.plain import (
    MICRO,
    RATE,
    STEPS,
    gradient,
    make_model,
    mean_loss,
    micro_batch,
    pair,
    reference,
    sq_norm,
    train,
    trained,
)
from tests.replicas import run_replicas


def one_process(rank, *, finish=lambda model: model):
    return finish(make_model()), contextlib.nullcontext


def ddp(
    rank, *, prepare=lambda model: model, finish=lambda model: model, reentrant=None, hook=None, sync=False, **settings
):
    model = DistributedDataParallel(prepare(make_model(reentrant=reentrant)), **settings)
    if hook is not None:
        hook(model)
    return finish(model), contextlib.nullcontext if sync else model.no_sync


def compile_blocks(model):
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return model


def whole_compiled(model):
    return torch.compile(model, backend="aot_eager")


def fully_sharded(rank, *, mesh_shape=None, sync=False, reentrant=None, **settings):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if mesh_shape is not None:
        settings["mesh"] = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard"))
    return wrap_blocks(make_model(reentrant=reentrant), fully_shard, sync=sync, **settings)


def replicated(rank, *, sync=False):
    from torch.distributed._composable.replicate_with_fsdp import replicate

    return wrap_blocks(make_model(), replicate, sync=sync)


def wrap_blocks(model, wrap, *, sync, prepare=lambda model: model, finish=lambda model: model, **settings):
    model = prepare(model)
    for block in model.blocks:
        wrap(block, **settings)
    wrap(model, **settings)

    @contextlib.contextmanager
    def no_sync():
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return finish(model), contextlib.nullcontext if sync else no_sync


def power_sgd(model):
    model.register_comm_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook)


def fp16(model):
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)


def fp16_wrapper(model):
    model.register_comm_hook(None, default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook))


ALONE = {
    "one process": one_process,
    "one process, compiled": functools.partial(one_process, finish=whole_compiled),
}
DDP = {
    "ddp": ddp,
    "ddp, synchronised each time": functools.partial(ddp, sync=True),
    # DDP itself supports neither no_sync nor accumulation beside a static graph that is reentrant.
    "ddp, static graph": functools.partial(ddp, sync=True, static_graph=True),
    "ddp, static graph, reentrant checkpointing": functools.partial(ddp, sync=True, static_graph=True, reentrant=True),
    "ddp, gradients as views, unused parameters looked for": functools.partial(
        ddp, gradient_as_bucket_view=True, find_unused_parameters=True
    ),
    "ddp, checkpointing": functools.partial(ddp, reentrant=False),
    "ddp, compiled outside": functools.partial(ddp, finish=whole_compiled),
    "ddp, compiled inside": functools.partial(ddp, prepare=whole_compiled),
    "ddp, compiled per block": functools.partial(ddp, prepare=compile_blocks),
    "ddp, PowerSGD in the hook": functools.partial(ddp, hook=power_sgd),
    "ddp, fp16 in the hook": functools.partial(ddp, hook=fp16),
    "ddp, fp16 round another hook": functools.partial(ddp, hook=fp16_wrapper),
}
SHARDED = {
    "fully_shard": fully_sharded,
    "fully_shard, synchronised each time": functools.partial(fully_sharded, sync=True),
    "fully_shard, not resharded": functools.partial(fully_sharded, reshard_after_forward=False),
    "fully_shard, checkpointing": functools.partial(fully_sharded, reentrant=False),
    "fully_shard, compiled per block": functools.partial(fully_sharded, prepare=compile_blocks),
    "fully_shard, compiled outside": functools.partial(fully_sharded, finish=whole_compiled),
    "replicate": replicated,
    "replicate, synchronised each time": functools.partial(replicated, sync=True),
}
HYBRID = {
    "hybrid 2 x 2": functools.partial(fully_sharded, mesh_shape=(2, 2)),
    "hybrid 2 x 2, synchronised each time": functools.partial(fully_sharded, mesh_shape=(2, 2), sync=True),
    "hybrid, shards of one": functools.partial(fully_sharded, mesh_shape=(4, 1)),
    "fully_shard": fully_sharded,
}
FAMILIES = {"ALONE": ALONE, "DDP": DDP, "SHARDED": SHARDED, "HYBRID": HYBRID}


def measure_all(rank, world_size, family):
    """Return for each wrapper of a family: the pair, whether training was the same bit for bit, the method."""
    found = {}
    for name, build in FAMILIES[family].items():
        torch._dynamo.reset()
        model, no_sync = build(rank)
        bare = train(model, rank, no_sync=no_sync)
        model, no_sync = build(rank)
        with dptrain.attach(model, every=1) as meter:
            measured = train(model, rank, no_sync=no_sync, meter=meter)
        same = all(torch.equal(a, b) for a, b in zip(bare, measured, strict=True))
        found[name] = pair(meter.read()), same, meter.method, meter.steps_dropped
    return found


@pytest.mark.parametrize(("family", "world_size"), [("ALONE", 1), ("DDP", 2), ("SHARDED", 2), ("HYBRID", 4)])
def test_agrees_with_plain_gradients_and_changes_no_bit(family, world_size):
    """In each wrapper the pair is that of plain gradients, all ranks read the same, and training is untouched."""
    results = run_replicas(measure_all, world_size=world_size, args=(family,), timeout_s=110)
    assert results.count(results[0]) == world_size
    expected = reference(world_size)
    for name, (found, same, method, dropped) in results[0].items():
        # The averaged gradient is the compressed one, which fp16 rounds.
        assert found == pytest.approx(expected, rel=1e-2 if "fp16" in name else 1e-4), name
        assert same, name
        assert method == ("parameters" if family in ("ALONE", "DDP") else "unsharded parameters"), name
        assert dropped == 0, name


def measure_with_hook(rank, world_size):
    """Return the pair under DDP's hook: alone, round two hooks of the user's, and with two backward passes in one."""
    found = {}
    for name, inner, state in (
        ("alone", None, None),
        ("fp16", default_hooks.fp16_compress_hook, None),
        ("PowerSGD", powerSGD_hook.powerSGD_hook, powerSGD_hook.PowerSGDState(None)),
    ):
        model, no_sync = ddp(rank)
        with dptrain.attach(model, every=1, method="hook", comm_hook=inner and (inner, state)) as meter:
            measured = train(model, rank, no_sync=no_sync, meter=meter)
        bare_state = powerSGD_hook.PowerSGDState(None) if name == "PowerSGD" else None
        model, no_sync = ddp(rank, hook=inner and (lambda m, h=inner, s=bare_state: m.register_comm_hook(s, h)))
        bare = train(model, rank, no_sync=no_sync)
        found[name] = pair(meter.read()), all(torch.equal(a, b) for a, b in zip(bare, measured, strict=True))
    return found


def test_the_hook_composes_with_hooks_of_the_user():
    """Round fp16 compression and PowerSGD the hook sees full precision, and training is what it was with them."""
    results = run_replicas(measure_with_hook, world_size=2)
    assert results[0] == results[1]
    for name, (found, same) in results[0].items():
        # The averaged gradient is the compressed one, which fp16 rounds.
        assert found == pytest.approx(reference(2, accumulated=True), rel=1e-2 if name == "fp16" else 1e-4), name
        assert same, name


def pass_backward_twice(model, no_sync, rank):
    """Two micro-batches, the first with two backward passes after its one forward pass."""
    for micro_step in range(2):
        x, y = micro_batch(0, micro_step, rank)
        with no_sync() if micro_step == 0 else contextlib.nullcontext():
            output = model(x)
            if micro_step == 0:
                (((output - y) ** 2).sum(1).mean() / 4).backward(retain_graph=True)
                (((output - y) ** 2).sum(1).mean() / 4).backward()
            else:
                (((output - y) ** 2).sum(1).mean() / 2).backward()


def two_passes(rank, world_size):
    """Return what the hook finds where each micro-batch has two backward passes; many syncs are refused."""
    bare, no_sync = ddp(rank)
    pass_backward_twice(bare, no_sync, rank)
    model, no_sync = ddp(rank)
    meter = dptrain.attach(model, every=1, method="hook")
    pass_backward_twice(model, no_sync, rank)
    meter.step()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(trained(bare), trained(model), strict=True))
    plain = make_model()
    for micro_step in range(2):
        (mean_loss(plain, *micro_batch(0, micro_step, rank)) / 2).backward()
    own = sq_norm([p.grad for p in trained(plain)])
    combined = sq_norm([p.grad for p in trained(model)])
    for micro_step in range(2):
        (mean_loss(model, *micro_batch(0, micro_step, rank)) / 2).backward()
    meter.step()
    assert meter.steps_dropped == 1
    return own, combined, pair(meter.read())


def test_several_backward_passes_are_right_under_the_hook():
    """The hook sees what the passes add up to; where DDP averaged more than once in a step it drops it."""
    results = run_replicas(two_passes, world_size=2)
    norms = SquaredNorms.of([own for own, _, _ in results], sizes=[2 * MICRO] * 2, large_sq_norm=results[0][1])
    moments = unbiased_moments(norms)
    assert results[0][2] == pytest.approx((moments.noise_trace, moments.grad_sq_norm), rel=1e-5)


def other_ways(rank, world_size):
    """Return (pair, whether training was the same bit for bit) of loops that differ in more than the wrapper."""
    return {
        "bf16": with_and_without(functools.partial(train, cast=torch.bfloat16), rank),
        "fp16": with_and_without(train_scaled, rank),
        "every other, ddp": with_and_without(train, rank, every=2),
        "every other, fsdp": with_and_without(train, rank, build=fully_sharded, every=2),
    }


def with_and_without(loop, rank, *, build=ddp, every=1):
    model, no_sync = build(rank)
    bare = loop(model, rank, no_sync=no_sync)
    model, no_sync = build(rank)
    scale = {"loss_scale": lambda: LOSS_SCALE} if loop is train_scaled else {}
    with dptrain.attach(model, every=every, **scale) as meter:
        measured = loop(model, rank, no_sync=no_sync, meter=meter)
    return pair(meter.read()), all(torch.equal(a, b) for a, b in zip(bare, measured, strict=True))


LOSS_SCALE = 1024.0


def train_scaled(model, rank, *, no_sync, meter=None):
    scaler = torch.amp.GradScaler("cpu", init_scale=LOSS_SCALE)
    optimizer = torch.optim.SGD(trained(model), lr=RATE)
    for step in range(STEPS):
        for micro_step in range(2):
            with (
                no_sync() if micro_step == 0 else contextlib.nullcontext(),
                torch.autocast("cpu", dtype=torch.float16),
            ):
                loss = mean_loss(model, *micro_batch(step, micro_step, rank))
                scaler.scale(loss / 2).backward()
        if meter is not None:
            meter.step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == LOSS_SCALE
    return [p.detach().clone() for p in model.parameters()]


def test_precision_and_skipped_steps():
    """Autocast, loss scaling and unmeasured steps leave the pair right and the training untouched."""
    results = run_replicas(other_ways, world_size=2)
    assert results[0] == results[1]
    expected = {
        "bf16": pytest.approx(reference(2, cast=torch.bfloat16), rel=0.01),
        "fp16": pytest.approx(reference(2, cast=torch.float16), rel=0.01),
        "every other, ddp": pytest.approx(reference(2, every=2), rel=1e-4),
        "every other, fsdp": pytest.approx(reference(2, every=2), rel=1e-4),
    }
    assert results[0] == {name: (found, True) for name, found in expected.items()}


def uneven_inputs(rank, world_size):
    """Return what each rank reads for both ways in which DDP divides; the meter must not be left out of Join."""
    found = []
    for by_active in (False, True):
        model, numbers = uneven_loop(rank, by_active=by_active)
        bare, _ = uneven_loop(rank, by_active=by_active, method=None)
        assert all(map(torch.equal, model, bare))
        found.append(numbers)
    model, numbers = uneven_loop(rank, by_active=False, method="hook")
    assert numbers == pytest.approx(found[0], rel=1e-5)
    assert all(map(torch.equal, model, uneven_loop(rank, by_active=False, method=None)[0]))
    model, _ = ddp(rank)
    with pytest.raises(ObservationError, match="divides by all ranks"):
        Join([model, dptrain.attach(model, method="hook")], divide_by_initial_world_size=False)
    model, _ = ddp(rank)
    dptrain.attach(model, every=1)
    with pytest.raises(ObservationError, match="Join"), Join([model]):
        model(torch.randn(3, 8))
    return found


def uneven_loop(rank, *, by_active, method="auto"):
    """Rank 1 has two batches less. Return the parameters and what the meter read; without a meter where no method."""
    model, _ = ddp(rank)
    optimizer = torch.optim.SGD(trained(model), lr=RATE)
    meter = method and dptrain.attach(model, every=1, method=method)
    with Join([model, meter] if meter else [model], divide_by_initial_world_size=not by_active):
        for step in range(5 - 2 * (rank == 1)):
            mean_loss(model, *micro_batch(step, 0, rank)).backward()
            if meter:
                meter.step()
            optimizer.step()
            optimizer.zero_grad()
    parameters = [p.detach().clone() for p in model.parameters()]
    return parameters, meter and [*pair(meter.read()), meter.read().num_steps]


def uneven_reference(by_active):
    model, sums = make_model(), PresentState()
    for step in range(5):
        active = [0, 1, 2] if step < 3 else [0, 2]
        gradients = [gradient(model, micro_batch(step, 0, rank)) for rank in active]
        mean = [sum(parts) / len(active) for parts in zip(*gradients, strict=True)]
        norms = SquaredNorms.of(
            [sq_norm(g) for g in gradients], sizes=[MICRO] * len(active), large_sq_norm=sq_norm(mean)
        )
        sums = present_updated(sums, unbiased_moments(norms))
        with torch.no_grad():
            for p, g in zip(trained(model), mean, strict=True):
                p.sub_((RATE * g * (1 if by_active else len(active) / 3)).float())
    return pair(noise_scale(present_moments(sums)))


def test_ranks_that_run_out_of_samples_do_not_count():
    """Inside Join the zeros of joined ranks are no small batches, however DDP divides; without the meter it refuses."""
    results = run_replicas(uneven_inputs, world_size=3)
    assert results.count(results[0]) == 3
    for by_active, found in zip((False, True), results[0], strict=True):
        assert found == pytest.approx([*uneven_reference(by_active), 5], rel=1e-4)


def refusals(rank, world_size):
    """Attach where it cannot be right; each must raise with its reason."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ObservationError, match="tensor parallelism"):
        dptrain.attach(parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()}))
    with pytest.raises(ObservationError, match="fully_shard"):
        dptrain.attach(FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu")))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0])
    with pytest.raises(ObservationError, match="root"):
        dptrain.attach(model)
    model, _ = fully_sharded(rank)
    with pytest.raises(ObservationError, match="2 shards"):
        dptrain.attach(model, geometry="adam", optimizer=torch.optim.Adam(model.parameters()))
    with pytest.raises(ObservationError, match="needs a DistributedDataParallel"):
        dptrain.attach(fully_sharded(rank)[0], method="hook")
    return True


def test_refuses_where_it_cannot_be_right():
    """Tensor parallelism alone, FSDP1 and half-sharded models are refused with reason and remedy."""
    assert all(run_replicas(refusals, world_size=2))
    with pytest.raises(ObservationError, match="DataParallel adds up"):
        dptrain.attach(nn.DataParallel(make_model()))


def context_meshes(rank, world_size):
    """Attach where the mesh for fully_shard has been flattened from others, and inside of torch's context_parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.experimental import context_parallel

    def sharded(shape, name):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_shard", "cp"))
        return fully_shard(nn.Linear(4, 4), mesh=mesh[("dp_shard", "cp")]._flatten(name))

    dptrain.attach(sharded((2, 1), "dp_shard_cp")).remove()
    with pytest.raises(ObservationError, match="without context parallelism"):
        dptrain.attach(sharded((1, 2), "fsdp"))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    buffers = {"buffers": [torch.zeros(8, 4)], "buffer_seq_dims": [0]}
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("rest", "cp"))["cp"]
    model = fully_shard(nn.Linear(4, 4), mesh=mesh)
    with dptrain.attach(model, every=1), context_parallel(alone, **buffers):
        model(torch.randn(2, 4))
    model = fully_shard(nn.Linear(4, 4), mesh=mesh)
    told = pytest.raises(ObservationError, match="without context parallelism")
    with dptrain.attach(model, every=1), context_parallel(mesh, **buffers), told:
        model(torch.randn(2, 4))
    styled = fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh)
    put_context_style_on(styled[0], mesh)
    with pytest.raises(ObservationError, match="without context parallelism"):
        dptrain.attach(styled)
    return True


def put_context_style_on(module, mesh):
    from torch.distributed.tensor.experimental._context_parallel._attention import _ContextParallel

    kind = _ContextParallel.AttentionType.SDPA
    _ContextParallel(seq_dim=2, attention_type=kind)._apply(module, mesh)


def test_context_parallelism_is_told_by_its_size_whatever_its_mesh_is_called():
    """A flattened mesh's name says nothing: torch's own state and the mesh that it was flattened from do."""
    assert all(run_replicas(context_meshes, world_size=2))


def offloaded(rank, world_size):
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    with pytest.raises(ObservationError, match="offload_policy"):
        dptrain.attach(fully_shard(nn.Linear(4, 4), offload_policy=CPUOffloadPolicy(pin_memory=False)))
    return True


def test_gradients_on_several_devices_are_refused():
    """Also those that fully_shard offloads to the host; a frozen parameter may be anywhere."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ObservationError, match="several devices"):
        dptrain.attach(model)
    model[1].requires_grad_(False)
    dptrain.attach(model).remove()
    assert all(run_replicas(offloaded, world_size=1))
