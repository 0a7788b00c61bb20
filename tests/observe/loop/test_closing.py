"""The optimizer's step closes the meter's: after unscaling and clipping, in one call with the backward pass."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from tests.observe.hooks.test_meshes import Truth, values
from tests.observe.plain import RATE, STEPS, make_model, mean_loss, micro_batch, pair, trained
from tests.replicas import run_replicas

SCALE, CLIP, ACCUMULATION = 512.0, 0.3, 2


class NativeScaler:
    """The order of timm's class of this name: backward, unscale, clip, step, update in one call."""

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    def __call__(self, loss, optimizer, *, parameters, need_update):
        self.scaler.scale(loss).backward()
        if need_update:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, CLIP)
            self.scaler.step(optimizer)
            self.scaler.update()


def scaled_loop(rank, *, measured):
    """Train in timm's order; return (parameters, meter, truth along the way)."""
    model, truth = DistributedDataParallel(make_model()), Truth(2)
    optimizer = torch.optim.SGD(trained(model), lr=RATE)
    loss_scaler = NativeScaler()
    meter = measured and dptrain.attach(model, optimizer=optimizer, loss_scale=loss_scaler.scaler.get_scale, every=1)
    for step in range(STEPS):
        truth.add(values(model), step)
        for micro_step in range(ACCUMULATION):
            loss = mean_loss(model, *micro_batch(step, micro_step, rank)) / ACCUMULATION
            last = micro_step == ACCUMULATION - 1
            loss_scaler(loss, optimizer, parameters=trained(model), need_update=last)
        optimizer.zero_grad()
    return values(model), meter, truth


def timm(rank, world_size):
    bare, _, _ = scaled_loop(rank, measured=False)
    parameters, meter, truth = scaled_loop(rank, measured=True)
    return pair(meter.read()), truth.pair(), all(map(torch.equal, bare, parameters)), meter.steps_dropped


def test_timms_order_needs_one_line():
    """Closed after unscaling and clipping the pair is that before them, and training is the same bit for bit."""
    for found, expected, same, dropped in run_replicas(timm, world_size=2):
        assert found == pytest.approx(expected, rel=1e-4)
        assert (same, dropped) == (True, 0)


def lossy_loop(rank, *, late, scale=1.0):
    """Return the pair under PowerSGD, closed before or after unscaling and clipping, and the steps that count."""
    model = DistributedDataParallel(make_model())
    model.register_comm_hook(powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2), powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.SGD(trained(model), lr=RATE)
    meter = dptrain.attach(model, optimizer=optimizer if late else None, every=1, loss_scale=lambda: scale)
    for step in range(STEPS):
        for micro_step in range(ACCUMULATION):
            with model.no_sync() if micro_step == 0 else contextlib.nullcontext():
                (scale * mean_loss(model, *micro_batch(step, micro_step, rank)) / ACCUMULATION).backward()
        if not late:
            meter.step()
        for p in trained(model):
            p.grad /= scale
        nn.utils.clip_grad_norm_(trained(model), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return pair(meter.read()), meter.read().num_steps


def lossy(rank, world_size):
    return lossy_loop(rank, late=False), lossy_loop(rank, late=True), lossy_loop(rank, late=True, scale=SCALE)


def test_clipping_is_divided_out_behind_a_hook_that_loses_information():
    """What PowerSGD hands on is not what came, but a factor on it afterwards shows."""
    for early, late, scaled in run_replicas(lossy, world_size=2):
        assert early[1] == late[1] == scaled[1] == STEPS
        assert late[0] == pytest.approx(early[0], rel=1e-4)
        assert scaled[0] == pytest.approx(early[0], rel=1e-3)  # PowerSGD's own matrices are rounded otherwise


@pytest.mark.parametrize("by_optimizer", [True, False])
def test_a_loop_that_announces_in_measured_steps_alone_is_measured_on(by_optimizer):
    """`if meter.measuring: meter.begin(…)`: the steps between are closed by the optimizer all the same."""
    model = make_model()
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    with dptrain.attach(model, optimizer=optimizer if by_optimizer else None, every=3) as meter:
        for step in range(9):
            for micro_step in range(2):
                if meter.measuring:
                    meter.begin(num_samples=5)
                (mean_loss(model, *micro_batch(step, micro_step, 0)) / 2).backward()
            if not by_optimizer:
                meter.step()
            optimizer.step()
            optimizer.zero_grad()
        assert (meter.read().num_steps, meter.steps_dropped) == (3, 0)


def test_a_step_is_closed_once_by_any_caller():
    """By hand before or after the optimizer, or by the first of two optimizers: each step counts once."""
    for order in ("optimizer alone", "by hand before", "by hand after", "two optimizers"):
        model = make_model()
        parameters = trained(model)
        split = len(parameters) // 2
        optimizers = [torch.optim.SGD(parameters, lr=0.0)]
        if order == "two optimizers":
            optimizers = [torch.optim.SGD(parameters[:split], lr=0.0), torch.optim.AdamW(parameters[split:], lr=0.0)]
        with dptrain.attach(model, optimizer=optimizers, every=1) as meter:
            for step in range(3):
                for micro_step in range(2):
                    (mean_loss(model, *micro_batch(step, micro_step, 0)) / 2).backward()
                if order == "by hand before":
                    meter.step()
                for optimizer in optimizers:
                    optimizer.step()
                if order == "by hand after":
                    assert meter.step().noise_scale.num_steps == step + 1
                model.zero_grad()
        assert (meter.read().num_steps, meter.steps_dropped) == (3, 0), order


def test_an_overflow_of_the_scaler_leaves_no_trace():
    """A step that the scaler skips is not closed; its micro-batches are not those of the next step."""
    model = make_model()
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    with dptrain.attach(model, optimizer=optimizer, every=1) as meter:
        for step in range(4):
            for micro_step in range(2):
                loss = mean_loss(model, *micro_batch(step, micro_step, 0)) / 2
                scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert (meter.read().num_steps, meter.steps_dropped, meter.read().num_samples) == (3, 0, 30)


def test_optimizers_that_run_the_backward_pass_are_refused():
    """LBFGS, a closure, and what is no torch optimizer: the remedy is to call `step` by hand."""
    model = make_model()
    for optimizer in (torch.optim.LBFGS(trained(model)), object()):
        with pytest.raises(ObservationError, match=r"meter\.step\(\)"):
            dptrain.attach(model, optimizer=optimizer)
        assert not model._forward_pre_hooks
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    with dptrain.attach(model, optimizer=optimizer), pytest.raises(ObservationError, match="closure"):
        optimizer.step(lambda: mean_loss(model, *micro_batch(0, 0, 0)))
