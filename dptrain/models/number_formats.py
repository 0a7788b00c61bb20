"""Number formats of few bits, emulated: rounding to their grids in float32, to the nearest number or by chance.

References: Micikevicius et al. 2022 (arXiv 2209.05433), fp8; Rouhani et al. 2023 (arXiv 2310.10537), fp6 and fp4;
Gupta et al. 2015 (arXiv 1502.02551), stochastic rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The numbers of a format.

    Attributes:
        largest: of the format.
        mantissa_bits: after the leading one; None for integers, whose grid is even.
        lowest_exponent: of the numbers that have a leading one; those below have the step of this exponent.
        is_scaled: whether tensors are multiplied such that their largest number is that of the format.
    """

    largest: float
    mantissa_bits: int | None = None
    lowest_exponent: int = 0
    is_scaled: bool = True


@dataclass(frozen=True, kw_only=True)
class NumberFormat:
    """What the products of a layer are computed in.

    Attributes:
        bits: of a number.
        forward: grid of weights and activations.
        backward: grid of the gradients of outputs.
    """

    bits: int
    forward: Grid
    backward: Grid


def _floats(bits: int, *, largest: float, mantissa_bits: int, lowest_exponent: int) -> NumberFormat:
    grid = Grid(largest=largest, mantissa_bits=mantissa_bits, lowest_exponent=lowest_exponent)
    return NumberFormat(bits=bits, forward=grid, backward=grid)


def _integers(bits: int) -> NumberFormat:
    grid = Grid(largest=2 ** (bits - 1) - 1)  # symmetric round zero
    return NumberFormat(bits=bits, forward=grid, backward=grid)


_BF16 = Grid(largest=torch.finfo(torch.bfloat16).max, mantissa_bits=7, lowest_exponent=-126, is_scaled=False)

FORMATS: Mapping[str, NumberFormat] = MappingProxyType(
    {
        "bf16": NumberFormat(bits=16, forward=_BF16, backward=_BF16),
        # e4m3 forward and e5m2 backward, as the paper recommends.
        "fp8": NumberFormat(
            bits=8,
            forward=Grid(largest=448, mantissa_bits=3, lowest_exponent=-6),
            backward=Grid(largest=57344, mantissa_bits=2, lowest_exponent=-14),
        ),
        "fp6": _floats(6, largest=28, mantissa_bits=2, lowest_exponent=-2),  # e3m2
        "fp4": _floats(4, largest=6, mantissa_bits=1, lowest_exponent=0),  # e2m1
        "int8": _integers(8),
        "int6": _integers(6),
        "int4": _integers(4),
        "int3": _integers(3),
    }
)
"""The formats by name."""


def rounded(values: Tensor, grid: Grid, *, dims: Sequence[int] | None = None, stochastic: bool = False) -> Tensor:
    """Return the values on a grid, in their own type and shape.

    Args:
        values: float32 or float64. Where one is not finite, all that share its scale are no numbers.
        grid: the numbers to round to.
        dims: dimensions over which numbers share a scale; None for all.
        stochastic: draw one of the two neighbours of each value from torch's default generator, such that the mean
            over draws is the value; otherwise the nearest, of two as near the even one.
    """
    if not values.numel():
        return values.clone()
    if not grid.is_scaled:
        return _on_grid(values, grid, stochastic=stochastic)
    peak = values.abs().amax(dim=tuple(dims) if dims is not None else tuple(range(values.dim())), keepdim=True)
    scale = peak / grid.largest
    # Zeros, and what is too small for a scale, become zero. Compared this way round, no number stays none.
    scale = torch.where(scale < torch.finfo(values.dtype).tiny, 1, scale)
    return _on_grid(values / scale, grid, stochastic=stochastic) * scale


def _on_grid(values: Tensor, grid: Grid, *, stochastic: bool) -> Tensor:
    if grid.mantissa_bits is None:
        return _whole(values, stochastic=stochastic).clamp(-grid.largest, grid.largest)
    # frexp's mantissa is in [0.5, 1), so the leading one stands at its exponent less one.
    exponent = torch.frexp(values).exponent - 1
    step = torch.ldexp(torch.ones_like(values), exponent.clamp(min=grid.lowest_exponent) - grid.mantissa_bits)
    return (_whole(values / step, stochastic=stochastic) * step).clamp(-grid.largest, grid.largest)


def _whole(values: Tensor, *, stochastic: bool) -> Tensor:
    if not stochastic:
        return values.round()
    below = values.floor()
    # Compared with the fraction, not added to the value: a sum would be rounded, and the mean would be off by that.
    return below + (torch.rand_like(values) < values - below).to(values.dtype)
