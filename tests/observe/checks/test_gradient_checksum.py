"""The checksum tells agreement, one common factor and contradiction apart, on plain numbers and on real gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptrain.observe.checks.common_factor import common_factor, with_reduction
from dptrain.observe.checks.gradient_checksum import NUM_CHECKS, GradientChecksum


class Odd(nn.Module):
    """A scalar, an image kernel, a half-precision vector and a complex one."""

    def __init__(self):
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.kernel = nn.Parameter(torch.randn(20, 3, 3, 3))
        self.brief = nn.Parameter(torch.randn(33, dtype=torch.bfloat16))
        self.phase = nn.Parameter(torch.randn(5, 4, dtype=torch.cfloat))


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for p in model.parameters():
        shape = torch.view_as_real(p).shape if p.is_complex() else p.shape
        weights = torch.randn(shape, generator=generator)
        total = total + ((torch.view_as_real(p) if p.is_complex() else p) * weights).sum()
    total.backward()


def factor_of(vectors, roundoff):
    """Return what the checksums of some ranks find together."""
    ranks = len(vectors)
    parts = (part.tolist() for part in torch.stack(vectors).sum(0).chunk(5))
    seen, _, variances, combined, _ = parts
    seen, combined = [x / ranks for x in seen], [x / ranks for x in combined]
    variances = with_reduction(seen, [x / ranks**2 for x in variances], roundoff=roundoff, ranks=ranks)
    return common_factor(seen, variances, combined)


def value_of(vectors, roundoff=1e-13):
    found = factor_of(vectors, roundoff)
    return found and found.value


def measured(change):
    """Return the factor that the checksum finds over five steps of two backward passes, `.grad` being changed."""
    model = Odd()
    parameters = list(model.parameters())
    checksum, found = GradientChecksum(parameters), []
    for step in range(5):
        checksum.open()
        checksum.watch()
        for number in range(2):
            backward(model, 10 * step + number)
        with torch.no_grad():
            change(model)
        found.append(value_of([checksum.vector()]))
        model.zero_grad()
        assert not parameters[1]._backward_hooks
    return found


def scale_all(model):
    for p in model.parameters():
        p.grad.mul_(0.25)


def scale_one(model):
    model.kernel.grad.mul_(3.0)


def test_scalars_kernels_halves_and_complex_numbers_are_checked():
    """Untouched gradients agree, a factor on all is found to 1 %, and a factor on one is a contradiction."""
    assert measured(lambda _: None) == [1.0] * 5
    assert measured(scale_all) == [pytest.approx(0.25, rel=0.01)] * 5
    assert measured(scale_one) == [None] * 5


def test_pieces_of_a_sharded_gradient_add_up():
    """Three shards of ten rows, of 4, 4 and 2, give the checksum of the whole."""
    parameter = nn.Parameter(torch.zeros(10, 7))
    grad = torch.randn(10, 7)
    whole, total = GradientChecksum([parameter]), 0
    whole.open()
    parameter.grad = grad
    expected = whole.vector()[3 * NUM_CHECKS : 4 * NUM_CHECKS]
    for number, piece in enumerate(grad.chunk(3)):
        one = nn.Parameter(torch.zeros_like(piece))
        one.grad = piece
        part = GradientChecksum([one], shard=(number, 3), num_rows=lambda _: 10)
        part.open()
        total = total + part.vector()[3 * NUM_CHECKS : 4 * NUM_CHECKS] / 3
    assert total.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_the_chosen_parameters_rotate_through_the_model():
    """Of thirty parameters each comes up within thirty steps."""
    checksum, seen = GradientChecksum([nn.Parameter(torch.zeros(2)) for _ in range(30)]), set()
    for _ in range(30):
        checksum.open()
        seen |= set(checksum._slots)
    assert seen == set(range(30))


def test_sparse_gradients_are_checked_too():
    """Coalesced or not, what was added up agrees with `.grad`; a factor is found, and a row that is gone is noticed."""
    table = nn.Embedding(40, 4, sparse=True)
    for change, expected in ((1.0, 1.0), (0.25, 0.25), (None, None)):
        checksum = GradientChecksum([table.weight])
        checksum.open()
        handle = table.weight.register_hook(lambda grad, checksum=checksum: checksum.note(0, grad))
        table.weight.grad = None
        for ids in ([1, 2, 2, 7], [7, 30]):
            table(torch.tensor(ids)).square().sum().backward()
        handle.remove()
        table.weight.grad = table.weight.grad.coalesce() * (1.0 if change is None else change)
        if change is None:
            table.weight.grad.values()[0] = 0
        factor = value_of([checksum.vector()])
        assert factor == (expected if expected is None else pytest.approx(expected, rel=1e-4))


class Rank:
    """Four layers of a replica whose gradients are drawn, and accumulated as `.grad` is."""

    def __init__(self, dtype, *, reduced_in):
        self.layers = [nn.Parameter(torch.zeros(8, 8, dtype=dtype)) for _ in range(4)]
        self.checksum = GradientChecksum(self.layers)
        if reduced_in is not None:
            self.checksum.expect_reduction_in(reduced_in)
        self.checksum.open()

    def add(self, gradients):
        for index, (layer, gradient) in enumerate(zip(self.layers, gradients, strict=True)):
            self.checksum.note(index, gradient)
            layer.grad = gradient.clone() if layer.grad is None else layer.grad.add_(gradient)


def reduced(ranks, index, dtype):
    """Return the mean of a layer's gradients over the ranks, added up one after another in a format."""
    own = [rank.layers[index].grad for rank in ranks]
    total = torch.zeros(8, 8, dtype=dtype)
    for gradient in own:
        total += (gradient / len(ranks)).to(dtype)
    return total.to(own[0].dtype)


def drawn_factor(*, dtype, reduced_in, num_ranks, num_micro_batches, signal, heavy, factor, change_one=1.0):
    """Return what is found where each layer's signal is so many standard deviations of a micro-batch's noise."""
    generator = torch.Generator().manual_seed(num_micro_batches)
    means = [signal * torch.randn(8, 8, generator=generator) for _ in range(4)]
    ranks = [Rank(dtype, reduced_in=reduced_in) for _ in range(num_ranks)]
    for rank in ranks:
        for _ in range(num_micro_batches):
            noise = [torch.randn(8, 8, generator=generator) for _ in means]
            if heavy:  # a tail like that of Student's t with two degrees of freedom
                noise = [x * torch.rand(8, 8, generator=generator) ** -0.5 for x in noise]
            rank.add([(1e-3 * (mean + x)).to(dtype) for mean, x in zip(means, noise, strict=True)])
    for index in range(4):
        total = reduced(ranks, index, reduced_in or dtype) * (factor * (change_one if index == 0 else 1.0))
        for rank in ranks:
            rank.layers[index].grad = total
    vectors = [rank.checksum.vector(num_ranks=num_ranks) for rank in ranks]
    return factor_of(vectors, ranks[0].checksum.roundoff)


FORMATS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float32, reduced in bfloat16": (torch.float32, torch.bfloat16),
    "float32, reduced in float16": (torch.float32, torch.float16),
}


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
@pytest.mark.parametrize("signal", [0.0, 0.2, 5.0])
@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(1, 4), (1, 64), (4, 16)])
@pytest.mark.parametrize("formats", FORMATS)
def test_a_factor_is_found_to_its_error_whatever_is_added_up(formats, num_ranks, num_micro_batches, signal, heavy):
    """Clipping by 3 % shows through the rounding of 64 micro-batches, no factor is no alarm, one layer's is."""
    dtype, reduced_in = FORMATS[formats]
    settings = {"num_ranks": num_ranks, "num_micro_batches": num_micro_batches, "signal": signal, "heavy": heavy}
    for factor in (1.0, 0.97, 0.5, 2.0**-16):
        found = drawn_factor(dtype=dtype, reduced_in=reduced_in, factor=factor, **settings)
        assert found is not None
        assert found.resolved
        assert abs(found.value / factor - 1) < 5 * found.error
        assert found.error < (2e-6 if formats == "float32" else 0.025)
        assert not found.rescales or factor != 1
        assert found.rescales or factor > 0.9
    assert drawn_factor(dtype=dtype, reduced_in=reduced_in, factor=0.9, change_one=3.0, **settings) is None


def test_rounding_does_not_move_the_factor_over_many_steps():
    """Of 64 micro-batches in bfloat16, none clipped and all by 3 %, the mean of 40 factors is right to 0.4 %."""
    for factor in (1.0, 0.97):
        found = []
        for seed in range(40):
            torch.manual_seed(seed)
            rank = Rank(torch.bfloat16, reduced_in=None)
            for _ in range(64):
                rank.add([torch.randn(8, 8).bfloat16() for _ in range(4)])
            for layer in rank.layers:
                layer.grad *= factor
            found.append(factor_of([rank.checksum.vector()], rank.checksum.roundoff).value)
        # A factor of 0.97 is 0.96875 in bfloat16 where the gradients are multiplied by a tensor of their own format.
        assert sum(found) / len(found) == pytest.approx(factor, abs=4e-3)
