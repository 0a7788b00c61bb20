"""The meter over the life of a loop: what counts as a micro-batch, what it keeps, and how it goes."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise import SquaredNorms, unbiased_moments
from dptrain.observe import DdpCommHook, Meter, ParameterHook
from dptrain.observe.geometry import PlainGeometry
from tests.observe.tied import MICRO, STEPS, make_model, mean_loss, micro_batch
from tests.replicas import run_replicas


def one_process_steps(meter, model, sizes_by_step):
    for step, sizes in enumerate(sizes_by_step):
        for micro_step, size in enumerate(sizes):
            (mean_loss(model, *micro_batch(step, micro_step, 0, size)) / len(sizes)).backward()
        meter.step()
        model.zero_grad()


def test_one_process_with_accumulation_equals_replicas():
    """Four micro-batches in one process are the same four small batches that four replicas have."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        for micro_step in range(4):
            (mean_loss(model, *micro_batch(0, 0, micro_step)) / 4).backward()
        meter.step()
    pair = meter.read()
    replicas = run_replicas(one_step_each, world_size=4)[0]
    assert (pair.noise_trace, pair.grad_sq_norm) == pytest.approx(replicas, rel=1e-5)


def one_step_each(rank, world_size):
    model = DistributedDataParallel(make_model(), find_unused_parameters=True)
    with dptrain.attach(model, every=1) as meter:
        mean_loss(model, *micro_batch(0, 0, rank)).backward()
        meter.step()
    return meter.read().noise_trace, meter.read().grad_sq_norm


def sq_norm(model):
    return sum(float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None)


def test_micro_batches_of_unequal_size_are_weighted():
    """4, 12 and 32 samples with the exact mean over samples give the pair of formula F3."""
    model, sizes = make_model(), (4, 12, 32)
    meter = Meter(model.parameters(), hook=ParameterHook(model.parameters()))
    norms = []
    for number, size in enumerate(sizes):
        meter.begin(num_samples=size, weight=size / sum(sizes))
        (mean_loss(model, *micro_batch(0, number, 0, size)) * size / sum(sizes)).backward()
        plain = make_model()
        mean_loss(plain, *micro_batch(0, number, 0, size)).backward()
        norms.append(sq_norm(plain))
    large = sq_norm(model)
    meter.step()
    expected = unbiased_moments(SquaredNorms.of(norms, sizes=sizes, large_sq_norm=large))
    assert meter.read().noise_trace == pytest.approx(expected.noise_trace, rel=1e-5)
    assert meter.read().grad_sq_norm == pytest.approx(expected.grad_sq_norm, rel=1e-5)


def test_a_filler_of_weight_zero_is_not_looked_at():
    """A replica without samples of its own runs a filler, which must leave no trace."""
    model = make_model()
    meter = Meter(model.parameters(), hook=ParameterHook(model.parameters()))
    for weight in (0.5, 0.0, 0.5):
        meter.begin(num_samples=MICRO, weight=weight)
        (mean_loss(model, *micro_batch(0, 0, int(weight * 10))) * weight).backward()
    meter.step()
    assert meter.read().num_samples == 2 * MICRO


def test_reading_late_or_never_changes_nothing():
    """Two hundred steps read once at the end give the same bits as two hundred read one by one."""
    readings = []
    for read_each in (True, False):
        model = make_model()
        with dptrain.attach(model, every=1) as meter:
            for step in range(200):
                for micro_step in range(2):
                    (mean_loss(model, *micro_batch(step % 7, micro_step, 0)) / 2).backward()
                reading = meter.step()
                if read_each:
                    _ = reading.noise_scale
                model.zero_grad()
        readings.append(meter.read())
    assert readings[0] == readings[1]
    assert readings[0].num_steps == 200


def test_state_goes_on_bit_for_bit():
    """A meter restored from its state_dict ends where the uninterrupted one ends."""
    whole, first, second = (make_model() for _ in range(3))
    meters = [dptrain.attach(model, every=1) for model in (whole, first, second)]
    one_process_steps(meters[0], whole, [(4, 4)] * 3 + [(4, 4, 4)] * 3)
    one_process_steps(meters[1], first, [(4, 4)] * 3)
    meters[2].load_state_dict(meters[1].state_dict())
    for step in range(3, 6):
        for micro_step in range(3):
            (mean_loss(second, *micro_batch(step, micro_step, 0, 4)) / 3).backward()
        meters[2].step()
        second.zero_grad()
    assert meters[0].state() == meters[2].state()


def test_a_fresh_state_begins_anew():
    """Steps whose sums were still under way when another state was loaded are not part of it."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        fresh = meter.state_dict()
        one_process_steps(meter, model, [(4, 4)] * 3)
        meter.load_state_dict(fresh)
        one_process_steps(meter, model, [(4, 4)])
        assert meter.read().num_steps == 1
        assert meter.read().num_samples == 8


def test_a_loop_can_ask_whether_a_step_is_measured():
    """With every=2 each other step is, known before it begins; who announces by hand is distinguished."""
    model = make_model()
    with dptrain.attach(model, every=2) as meter:
        known = []
        for _ in range(4):
            known.append(meter.measuring)
            one_process_steps(meter, model, [(4, 4)])
        assert known == [True, False, True, False]
        assert meter.read().num_steps == 2
        assert not meter.by_hand
        meter.begin(num_samples=4)
        assert meter.by_hand


def test_evaluation_is_not_measured():
    """Forward passes in evaluation mode or without gradients are no micro-batches."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        for micro_step in range(2):
            (mean_loss(model, *micro_batch(0, micro_step, 0)) / 2).backward()
            with torch.no_grad():
                model(torch.randn(50, 6))
            model.eval()
            model(torch.randn(70, 6))
            model.train()
        meter.step()
    assert meter.read().num_samples == 2 * MICRO


def test_two_backward_passes_after_one_forward_are_refused():
    """The sum of two squares is not the square of the sum: the meter refuses instead of telling a wrong number."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        output = model(torch.randn(4, 6))
        output.sum().backward(retain_graph=True)
        (output**2).sum().backward()
        with pytest.raises(ObservationError, match="backward"):
            meter.step()


def test_a_forward_pass_without_a_backward_pass_is_replaced_by_the_next():
    """A pass in training mode whose loss was thrown away does not count as a micro-batch."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        for micro_step in range(2):
            model(torch.randn(50, 6))
            (mean_loss(model, *micro_batch(0, micro_step, 0)) / 2).backward()
        meter.step()
    assert meter.read().num_samples == 2 * MICRO


def test_one_small_batch_says_nothing_and_is_counted():
    """One process with one micro-batch has nothing to compare: no estimate, and the step counts as dropped."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        mean_loss(model, *micro_batch(0, 0, 0)).backward()
        meter.step()
        assert meter.steps_dropped == 1
        assert str(meter.read().state) == "not resolved yet"


def test_remove_leaves_the_model_as_it_was():
    """After remove no hook is left on module or parameters, and the meter can still be read."""
    model = make_model()
    meter = dptrain.attach(model)
    one_process_steps(meter, model, [(4, 4)])
    meter.remove()
    assert not model._forward_pre_hooks
    assert all(p._backward_hooks is None for p in model.parameters())
    assert meter.read().num_steps == 1


def leave_one_by_one(rank, world_size):
    """Rank 1 is done with its last step before rank 0 begins to close it, and leaves."""
    model = DistributedDataParallel(make_model(), find_unused_parameters=True)
    with dptrain.attach(model, every=1) as meter:
        for step in range(STEPS):
            mean_loss(model, *micro_batch(step, 0, rank)).backward()
            if rank == 0 and step == STEPS - 1:
                time.sleep(0.5)
            meter.step()
            model.zero_grad()
        num_steps = meter.read().num_steps if rank == 0 else STEPS
    torch.distributed.destroy_process_group()
    return num_steps


def test_a_rank_that_leaves_takes_no_sum_away_from_the_others():
    """Remove waits for the sums under way: who never reads may destroy the process group after it."""
    assert run_replicas(leave_one_by_one, world_size=2) == [STEPS, STEPS]


def leave_after_an_error(rank, world_size):
    model, waited = make_model(), []
    for error in (True, False):
        with contextlib.suppress(KeyError), dptrain.attach(model, every=1) as meter:
            meter._absorb_up_to = waited.append
            if error:
                raise KeyError
    with dptrain.attach(model, every=1) as meter:
        meter._absorb_up_to = waited.append
        torch.distributed.destroy_process_group()
    return waited


def test_remove_waits_for_nobody_after_an_error():
    """Where a loop failed, or the process group is gone, the sums under way may never come."""
    assert run_replicas(leave_after_an_error, world_size=1) == [[0]]


def test_between_measured_steps_only_the_users_hooks_are_left():
    """A step that is not measured calls no Python in its backward pass but what the user put there, which stays."""
    model = make_model()
    seen = []
    with dptrain.attach(model, every=2) as meter:
        handle = model.head.weight.register_hook(seen.append)
        one_process_steps(meter, model, [(4, 4)])
        assert not meter.measuring
        assert [name for name, p in model.named_parameters() if p._backward_hooks is not None] == ["head.weight"]
        one_process_steps(meter, model, [(4, 4), (4, 4)])
        assert len(seen) == 2 + 2 + 2
        assert meter.read().num_steps == 2
        handle.remove()


class RecordingGeometry(PlainGeometry):
    """Notes where norms are written."""

    def __init__(self):
        super().__init__()
        self.places = []

    def norm(self, index, grad, *, out=None):
        norm = super().norm(index, grad, out=out)
        self.places.append((index, norm.data_ptr()))
        return norm


def test_norms_are_written_to_the_same_places():
    """No scalar is allocated among the gradients of a backward pass once there is one for each parameter."""
    model, geometry = make_model(), RecordingGeometry()
    hook = ParameterHook(model.parameters(), geometry=geometry)
    meter = Meter(model.parameters(), hook=hook, geometry=geometry)
    for step in range(3):
        for micro_step in range(2):
            meter.begin(num_samples=MICRO)
            (mean_loss(model, *micro_batch(step, micro_step, 0)) / 2).backward()
        meter.step()
        model.zero_grad()
    # The tied weight, the bias of the second layer, and two parameters of the head.
    assert len(geometry.places) == 3 * 2 * 4
    assert len(set(geometry.places)) == 4


def test_a_model_may_change_its_precision_under_the_meter():
    """Norms in double precision get places of their own, and are those that a meter of a double model tells."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        fresh = meter.state_dict()
        one_process_steps(meter, model, [(4, 4)])
        model.double()
        meter.load_state_dict(fresh)
        pairs = [double_step(meter, model), double_step(dptrain.attach(model, every=1), model)]
    assert pairs[0] == pairs[1]


def double_step(meter, model):
    for micro_step in range(2):
        x, y = micro_batch(1, micro_step, 0)
        (((model(x.double()) - y.double()) ** 2).sum(1).mean() / 2).backward()
    meter.step()
    model.zero_grad()
    pair = meter.read()
    return pair.noise_trace, pair.grad_sq_norm


def refuse_plain_module(rank, world_size):
    with pytest.raises(ObservationError, match="DistributedDataParallel"):
        dptrain.attach(make_model())
    model = DistributedDataParallel(make_model())
    DdpCommHook(model)
    with pytest.raises(ObservationError, match="taken already"):
        dptrain.attach(model, method="hook")
    return True


def test_refuses_where_it_cannot_be_right():
    """A bare module among several ranks and a hook slot that is taken are refused with the remedy."""
    assert all(run_replicas(refuse_plain_module, world_size=2))
    with pytest.raises(ObservationError, match="needs a DistributedDataParallel"):
        dptrain.attach(make_model(), method="hook")
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ObservationError, match="no parameter"):
        dptrain.attach(frozen)
