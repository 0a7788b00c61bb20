"""What the loop tells the meter, and what the meter finds out by itself: sizes, weights, losses, two models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise import MomentSums, Smoothing, SquaredNorms, smoothed, unbiased_moments
from tests.observe.plain import RATE, gradient, make_model, micro_batch, pair, reference, sq_norm, trained
from tests.replicas import run_replicas

SIZES = ((3, 9), (5, 2))
"""Samples in the micro-batches of two ranks."""


def sum_loss(model, x, y):
    return ((model(x) - y) ** 2).sum()


def summed(rank, world_size):
    """Return the pairs with losses summed over samples, told by `loss` and told by hand."""
    bare, _ = train_summed(rank, reported=None)
    found = []
    for reported in ("loss", "by hand"):
        parameters, meter = train_summed(rank, reported=reported)
        assert all(map(torch.equal, bare, parameters))
        found.append(pair(meter.read()))
    return found


def train_summed(rank, *, reported):
    model = DistributedDataParallel(make_model())
    optimizer = torch.optim.SGD(trained(model), lr=RATE / 5)
    meter = reported and dptrain.attach(model, every=1, loss="sum" if reported == "loss" else "mean")
    for step in range(4):
        for micro_step, size in enumerate(SIZES[rank]):
            if reported == "by hand":
                meter.begin(num_samples=size, weight=size * 0.2)
            (0.2 * sum_loss(model, *micro_batch(step, micro_step, rank, size))).backward()
        if meter:
            meter.step()
        # Undo the factor, so that both loops take the same path as the plain one.
        for p in trained(model):
            p.grad.mul_(25)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], meter


def test_losses_that_are_summed_over_uneven_micro_batches():
    """Sizes 3, 9 | 5, 2, summed: the pair is that of plain gradients weighted by samples, and training is untouched."""
    (reported, by_hand), other = run_replicas(summed, world_size=2)
    assert [reported, by_hand] == other
    trace, square = reference(2, sizes=SIZES)
    assert by_hand == pytest.approx((trace, square), rel=1e-4)
    # The further factor 0.2 on the loss that only the second loop told of: the ratio does not see it.
    assert reported == pytest.approx((0.2**2 * trace, 0.2**2 * square), rel=1e-4)


LENGTHS = (((4, 1, 3), (2, 5)), ((1, 1), (6, 2, 2, 4)))
"""Tokens of each sequence, by rank and micro-batch."""


def token_losses(model, step, micro_step, rank):
    """Return the summed loss of the tokens of each sequence; what is beyond its length does not count."""
    lengths = torch.tensor(LENGTHS[rank][micro_step])
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_step + rank)
    x, y = (torch.randn(len(lengths), 6, size, generator=generator) for size in (8, 2))
    counts = torch.arange(6) < lengths[:, None]
    return (((model(x) - y) ** 2).sum(-1) * counts).sum(1)


def weighted_by_tokens(rank, world_size):
    """Return the noise scale of a loop that divides each micro-batch's sum by the tokens of the global batch."""
    model = DistributedDataParallel(make_model())
    num_tokens = sum(sum(sum(lengths) for lengths in own) for own in LENGTHS)
    with dptrain.attach(model, every=1, loss="sum") as meter:
        for step in range(3):
            for micro_step in range(2):
                (token_losses(model, step, micro_step, rank).sum() * world_size / num_tokens).backward()
            meter.step()
            model.zero_grad()
    window = meter.read_window()
    return window.noise_trace / window.grad_sq_norm


def test_losses_that_are_weighted_by_tokens():
    """Sequences of unequal lengths in unequal micro-batches: a sample is a sequence with the sum over its tokens."""
    found = run_replicas(weighted_by_tokens, world_size=2)
    sums = MomentSums()
    for step in range(3):
        keys = [(rank, micro_step) for rank in range(2) for micro_step in range(2)]
        sizes = [len(LENGTHS[rank][micro_step]) for rank, micro_step in keys]
        model, gradients = make_model(), []
        for rank, micro_step in keys:
            loss = token_losses(model, step, micro_step, rank).mean()
            gradients.append([g.double() for g in torch.autograd.grad(loss, trained(model))])
        shares = [size / sum(sizes) for size in sizes]
        mean = [sum(w * g for w, g in zip(shares, parts, strict=True)) for parts in zip(*gradients, strict=True)]
        norms = SquaredNorms.of([sq_norm(g) for g in gradients], sizes=sizes, large_sq_norm=sq_norm(mean))
        sums = Smoothing().update(sums, unbiased_moments(norms))
    expected = smoothed(sums)
    assert found == pytest.approx([expected.noise_trace / expected.grad_sq_norm] * 2, rel=1e-4)


def test_begin_by_hand_ends_the_counting_of_forward_passes():
    """A loop that announces its micro-batches is never counted a second time by the forward hook."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        norms, large = [], None
        for number, size in enumerate((4, 12)):
            batch = micro_batch(0, number, 0, size)
            meter.begin(num_samples=size, weight=size / 16)
            (((model(batch[0]) - batch[1]) ** 2).sum(1).mean() * size / 16).backward()
            norms.append(sq_norm(gradient(make_model(), batch)))
        large = sq_norm([p.grad for p in trained(model)])
        meter.step()
    moments = unbiased_moments(SquaredNorms.of(norms, sizes=(4, 12), large_sq_norm=large))
    assert pair(meter.read()) == pytest.approx((moments.noise_trace, moments.grad_sq_norm), rel=1e-5)
    assert meter.read().num_samples == 16


def test_two_models_have_meters_of_their_own():
    """As with a GAN: the judge's meter is told which passes are its own, and both read what plain gradients give."""
    maker, judge = make_model(), nn.Linear(2, 1)
    maker_meter, judge_meter = (dptrain.attach(model, every=1) for model in (maker, judge))
    for number in range(2):
        x, y = micro_batch(0, number, 0)
        judge_meter.begin(num_samples=5)
        with torch.no_grad():
            made = maker(x)
        loss = (judge(made) - judge(y)).square().mean() / 2
        loss.backward()
    judge_square = sq_norm([p.grad for p in judge.parameters()])
    judge_meter.step()
    for number in range(2):
        judge_meter.begin(num_samples=5, weight=0)
        x, _ = micro_batch(0, number, 0)
        (judge(maker(x)).square().mean() / 2).backward()
    maker_meter.step()
    assert judge_meter.read().num_samples == maker_meter.read().num_samples == 10
    scale = judge_meter.read()
    # Formula F1 for the step's batch of ten.
    assert scale.grad_sq_norm + scale.noise_trace / 10 == pytest.approx(judge_square, rel=1e-5)


def test_wrong_settings_are_distinguished():
    """Each setting that cannot be is refused by its name."""
    model = make_model()
    for settings, text in (
        ({"method": "guess"}, "method must be"),
        ({"loss": "max"}, "loss must be"),
        ({"geometry": "euclid"}, "geometry must be"),
        ({"geometry": "adam"}, "give it as `optimizer`"),
        ({"every": 0}, "every must be"),
        ({"budget": 0.0}, "budget must be"),
        ({"comm_hook": (sum_loss, None)}, "`comm_hook` is for"),
    ):
        with pytest.raises(ObservationError, match=text):
            dptrain.attach(model, **settings)
    assert all(not p._backward_hooks for p in model.parameters())


def test_a_scaler_is_read_where_it_is():
    """The meter takes the GradScaler itself: the noise scale of the plain loop, and no value is asked of a tensor."""
    from benchmarks.gpu.host_syncs import counted

    found = {}
    for scaled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        generator = torch.Generator().manual_seed(1)
        with dptrain.attach(model, every=1, loss_scale=scaler) as meter:
            for _ in range(3):
                for _ in range(2):
                    loss = model(torch.randn(8, 4, generator=generator)).square().mean() / 2
                    scaler.scale(loss).backward()
                with counted() as places:
                    meter.step()
                assert not places, places
                model.zero_grad()
            sums = meter.state().sums
        found[scaled] = sums
    plain, with_scaler = (smoothed(found[scaled]) for scaled in (False, True))
    assert with_scaler.grad_sq_norm == pytest.approx(plain.grad_sq_norm, rel=1e-6)
    assert with_scaler.noise_trace == pytest.approx(plain.noise_trace, rel=1e-6)
