"""Refuses a state that holds numbers that are not finite, before it could take the place of healthy checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dptrain.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor


class StateNotFiniteError(CheckpointError):
    """The state of a training that has diverged; none is written."""


def check_finite(tensors: Mapping[str, Mapping[str, Tensor]], *, infinite: Collection[str] = ()) -> None:
    """Refuse tensors with NaN or infinities in them, before retention could trade healthy checkpoints for such ones.

    Refused and not saved with a mark: a marked checkpoint would need room, rules of its own in retention and in the
    search for the newest, and serves nobody, since what went wrong can be looked at in the run that stops.

    Args:
        tensors: group → key → tensor.
        infinite: entries (`model/mask`) in which infinities are meant. NaN never is.

    Raises:
        StateNotFiniteError: naming the first such tensor.
    """
    for name, group in tensors.items():
        for key, tensor in group.items():
            found = _not_finite(tensor)
            if found == "NaN" or (found and f"{name}/{key}" not in infinite):
                raise StateNotFiniteError(
                    f"this state is not saved, as it holds numbers that are not finite: {name}/{key} holds {found}; "
                    f"earlier checkpoints stay"
                )


def _not_finite(tensor: Tensor) -> str | None:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if real.element_size() == 1:
        real = real.float()  # torch has no reductions over eight-bit floats
    # Both pass NaN on. In one sweep and without a tensor of flags, unlike `isfinite().all()`.
    ends = torch.stack(torch.aminmax(real))
    if ends.isnan().any():
        return "NaN"
    return "infinity" if ends.isinf().any() else None
