"""The interface of a norm in which gradients are measured, and the plain one."""

from __future__ import annotations

from collections.abc import Callable
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

        Args:
            index: of the parameter.
            grad: its gradient.
            out: what was returned for such a gradient before, to write it to.
        """


class PlainGeometry:
    """‖g‖, the geometry of SGD."""

    name = "sgd"

    def open(self) -> None:
        """Nothing to take."""

    def norm(self, index: int, grad: Tensor, *, out: Tensor | None = None) -> Tensor:  # noqa: ARG002 - all alike
        """Return ‖g‖."""
        return precise_norm(grad, out=out)


def precise_norm(grad: Tensor, *, out: Tensor | None) -> Tensor:
    """Return ‖grad‖ in at least single precision, the modulus where it is complex.

    Args:
        grad: of any precision.
        out: where to write it.
    """
    if grad.is_complex():
        grad = torch.view_as_real(grad)
    # Reduced precision would lose the very difference that is measured. To name the dtype costs 2 µs a call.
    if grad.dtype in _PRECISE:
        return _norm(grad, out=out)
    return _norm(grad, dtype=torch.float32, out=out)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this rank holds; a plain tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
