"""Rounding to the grids of few bits: the numbers that torch's own types have, and by chance right in the mean."""

from __future__ import annotations

import pytest
import torch

from dptrain.models.number_formats import FORMATS, Grid, rounded

NARROW = {
    "e4m3": (FORMATS["fp8"].forward, torch.float8_e4m3fn),
    "e5m2": (FORMATS["fp8"].backward, torch.float8_e5m2),
    "bf16": (FORMATS["bf16"].forward, torch.bfloat16),
}


def spread(count):
    """Numbers of both signs over 14 orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator) * torch.exp(4 * torch.randn(count, generator=generator))


@pytest.mark.parametrize("name", NARROW)
def test_nearest_numbers_are_those_of_torchs_types(name):
    """Without a scale, each of 100,000 numbers becomes what a cast gives, subnormal ones and ties among them."""
    grid, dtype = NARROW[name]
    plain = Grid(
        largest=grid.largest,
        mantissa_bits=grid.mantissa_bits,
        lowest_exponent=grid.lowest_exponent,
        is_scaled=False,
    )
    ties = 1 + torch.arange(64) / 64
    values = torch.cat([spread(100_000), ties]).clamp(-grid.largest, grid.largest)
    assert torch.equal(rounded(values, plain), values.to(dtype).float())


@pytest.mark.parametrize("kind", ["fp6", "fp4", "int8", "int6", "int4", "int3"])
def test_a_format_has_as_many_numbers_as_its_bits_allow(kind):
    """Dense values from −1 to 1 meet all 2^bits − 1 of them (zero has one sign), and the largest stays as it is."""
    values = torch.linspace(-1, 1, 20_001)
    found = rounded(values, FORMATS[kind].forward)
    assert len(found.unique()) == 2 ** FORMATS[kind].bits - 1
    assert found[0] == pytest.approx(-1)
    assert (found - values).abs().max() < 1


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("side", ["forward", "backward"])
def test_rounding_by_chance_is_right_in_the_mean(kind, side):
    """The mean of 20,000 draws is the value within 4.5 standard errors, and the draws are its two neighbours."""
    torch.manual_seed(0)
    grid = getattr(FORMATS[kind], side)
    values = torch.tensor([-1.0, 0.9371, 0.41113, -0.1377, 0.0311, 3e-3, -1e-4])
    draws = rounded(values.expand(20_000, -1), grid, dims=(-1,), stochastic=True).double()
    step = draws.amax(0) - draws.amin(0)
    allowed = 4.5 * draws.std(0) / 20_000**0.5 + 1e-6 * values.abs()
    assert bool(((draws.mean(0) - values).abs() <= allowed).all())
    assert bool((step > 0)[1:5].all())
    for column, value in zip(draws.T, values.tolist(), strict=True):
        assert len(column.unique()) <= 2
        assert column.min() <= value + 1e-6
        assert column.max() >= value - 1e-6


def test_what_is_not_finite_stays_so_and_zeros_stay_zero():
    """An infinity makes no numbers of all that share its scale, and not of others; zeros and tiny numbers become 0."""
    values = torch.tensor([[float("inf"), 1.0], [2.0, 1.0], [0.0, 0.0], [1e-44, 0.0]])
    for kind in ("fp8", "int4"):
        found = rounded(values, FORMATS[kind].forward, dims=(-1,))
        assert not torch.isfinite(found[0]).any()
        assert found[1].tolist() == pytest.approx([2.0, 1.0], rel=0.15)
        assert not found[2:].any()
