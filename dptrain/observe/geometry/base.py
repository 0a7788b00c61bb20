"""The interface of a norm in which gradients are measured, and the plain one."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Literal, Protocol

import torch
from torch import Tensor

GeometryName = Literal["sgd", "adam", "sign", "spectral"]

_norm: Callable[..., Tensor] = torch.linalg.vector_norm
_PRECISE = (torch.float32, torch.float64)


class Geometry(Protocol):
    """How long a gradient is.

    Attributes:
        name: as it is shown beside the noise scale.
    """

    name: str

    def open(self) -> None:
        """Take what stays in force for one optimizer step; called before its first gradient is seen."""

    def norm(self, index: int, grad: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return the norm of the gradient of parameter `index`, a scalar of at least single precision.

        Of a parameter whose rows belong to several groups, one norm for each row, shape (rows,).

        Args:
            index: of the parameter.
            grad: its gradient.
            out: what was returned for such a gradient before, to write it to.
        """


class PlainGeometry:
    """‖g‖, the geometry of SGD.

    Args:
        by_rows: numbers of the parameters that get a norm for each row, as their groups have it.
    """

    name = "sgd"

    def __init__(self, by_rows: Container[int] = ()) -> None:
        self._by_rows = by_rows

    def open(self) -> None:
        """Nothing to take."""

    def norm(self, index: int, grad: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Return ‖g‖, or ‖g‖ of each row."""
        if index in self._by_rows:
            return precise_norm(grad.flatten(1), out=out, dim=1)
        return precise_norm(grad, out=out)


def precise_norm(grad: Tensor, *, out: Tensor | None, dim: int | None = None) -> Tensor:
    """Return ‖grad‖ in at least single precision, the modulus where it is complex.

    Args:
        grad: of any precision.
        out: where to write it.
        dim: over which it is taken; over all of them where not given.
    """
    if grad.is_complex():
        grad = torch.view_as_real(grad)
    # Reduced precision would lose the very difference that is measured. To name the dtype costs 2 µs a call.
    if grad.dtype in _PRECISE:
        return _norm(grad, dim=dim, out=out)
    return _norm(grad, dim=dim, dtype=torch.float32, out=out)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank holds; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
