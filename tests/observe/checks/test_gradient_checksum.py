"""The checksum tells agreement, one common factor and contradiction apart, on plain numbers and on real gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dptrain.observe.checks.gradient_checksum import (
    NUM_CHECKS,
    GradientChecksum,
    combined_differs,
    common_factor,
)

SEEN = [1.0, -2.0, 0.5, 3.0, -0.1, 0.7, 1.1, -0.4]
SIZES = [4.0] * NUM_CHECKS
EXACT = 1e-4

factors = st.floats(1e-6, 1e6).filter(lambda factor: abs(factor - 1) > 0.01) | st.floats(-1e6, -1e-6)


def test_agreement_is_a_factor_of_one():
    """Within what rounding explains the factor is exactly 1, also where all is zero."""
    rounded = [x + 2e-4 for x in SEEN]
    assert common_factor(SEEN, SIZES, rounded, tolerance=EXACT) == 1
    assert common_factor([0.0] * 8, [0.0] * 8, [0.0] * 8, tolerance=EXACT) == 1


@given(factors)
def test_a_common_factor_is_found(factor):
    """From a millionth, as a loss scale taken out, to a million; a negative one is that of a loop that ascends."""
    combined = [factor * x for x in SEEN]
    assert common_factor(SEEN, SIZES, combined, tolerance=EXACT) == pytest.approx(factor, rel=1e-6)


@given(factors, st.integers(0, NUM_CHECKS - 1))
def test_one_check_that_differs_is_a_contradiction(factor, position):
    """Whatever the factor of the others."""
    combined = [factor * x for x in SEEN]
    combined[position] += factor * 0.1
    assert common_factor(SEEN, SIZES, combined, tolerance=EXACT) is None


@pytest.mark.parametrize(
    "combined",
    [[0.0] * 8, [-x for x in SEEN[:4]] + SEEN[4:], [*SEEN[:4], 0.0, 0.0, 0.0, 0.0]],
    ids=["cleared", "half negated", "half cleared"],
)
def test_what_no_factor_explains_is_a_contradiction(combined):
    """Cleared, or cleared or negated in part."""
    assert common_factor(SEEN, SIZES, combined, tolerance=EXACT) is None


def test_a_gradient_that_nobody_brought_is_a_contradiction():
    """Where nothing was seen `.grad` must hold nothing."""
    assert common_factor([0.0] * 8, [0.0] * 8, SEEN, tolerance=EXACT) is None


def test_ranks_that_differ_are_distinguished_from_rounding():
    """The spread over the ranks is compared with the magnitudes."""
    squares = [x * x for x in SEEN]
    assert not combined_differs(SEEN, squares, SIZES, tolerance=EXACT)
    assert combined_differs(SEEN, [squares[0] + 0.01, *squares[1:]], SIZES, tolerance=EXACT)


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
        values = checksum.vector().tolist()
        seen, sizes, combined = (values[i * NUM_CHECKS : (i + 1) * NUM_CHECKS] for i in range(3))
        found.append(common_factor(seen, sizes, combined, tolerance=checksum.tolerance()))
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
    expected = whole.vector()[2 * NUM_CHECKS : 3 * NUM_CHECKS]
    for number, piece in enumerate(grad.chunk(3)):
        one = nn.Parameter(torch.zeros_like(piece))
        one.grad = piece
        part = GradientChecksum([one], shard=(number, 3), num_rows=lambda _: 10)
        part.open()
        total = total + part.vector()[2 * NUM_CHECKS : 3 * NUM_CHECKS] / 3
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
        values = checksum.vector().tolist()
        seen, magnitudes, combined = (values[i * NUM_CHECKS : (i + 1) * NUM_CHECKS] for i in range(3))
        factor = common_factor(seen, magnitudes, combined, tolerance=EXACT)
        assert factor == (expected if expected is None else pytest.approx(expected, rel=1e-4))
