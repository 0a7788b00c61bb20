"""Dual norms of a replica's first micro-batch and of the averaged gradient, for sign and spectral descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dptrain.errors import ObservationError
from dptrain.noise import MomentSums, NoiseScale, Smoothing, smoothed
from dptrain.noise.dual import DualNorms, dual_moments, dual_noise_scale, sign_factor, spectral_factor
from dptrain.observe.groups import Groups
from dptrain.observe.reduction import on_device

DualName = Literal["sign", "spectral"]
_NUM_SIZES = 3


class DualGeometry:
    """Takes dual norms in measured steps, and keeps their smoothed moments, whole and by group.

    Of each parameter it keeps a copy of the first micro-batch's gradient until the step is closed, which takes the
    memory of one gradient. Kernels per parameter and measured step: a copy, a difference and three norms. The spectral
    norm is a singular value decomposition.

    Args:
        parameters: those that are measured.
        kinds: of each, "sign" (L1: Signum, Lion) or "spectral" (nuclear: Muon).
        groups: which of them belongs where.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.

    Raises:
        ObservationError: for a spectral parameter that is no matrix.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        kinds: Sequence[DualName],
        groups: Groups,
        smoothing: Smoothing | None,
        level: float,
    ) -> None:
        for parameter, kind in zip(parameters, kinds, strict=True):
            if kind == "spectral" and parameter.dim() < 2:  # noqa: PLR2004 - a matrix
                raise ObservationError(
                    f"a parameter of shape {tuple(parameter.shape)} has no spectral norm: give geometry as a mapping "
                    "from groups, with 'sign' or 'sgd' for those that are no matrices"
                )
        self._parameters, self._kinds, self._groups = parameters, kinds, groups
        self.name: str = kinds[0] if len(set(kinds)) == 1 else "mixed"
        self._names = groups.names or ("",)
        self._smoothing, self._level = smoothing or Smoothing(), level
        self._sums = dict.fromkeys(("whole", *groups.names), MomentSums())
        self._first: dict[int, Tensor] = {}
        self._zero = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        self.num_values = 3 * len(self._names) + _NUM_SIZES

    def note(self, index: int, grad: Tensor) -> None:
        """Keep the gradient of parameter `index`, as the first micro-batch brings it."""
        self._first[index] = grad.detach().clone()

    def forget(self) -> None:
        """Drop what is kept."""
        self._first.clear()

    @torch.no_grad()
    def vector(self, sizes: Sequence[float]) -> Tensor:
        """Return this rank's (deviation, small, large by group, b, B, 1), to be summed over the ranks.

        Args:
            sizes: samples in each micro-batch of the step; not a number comes of unequal ones.
        """
        first, self._first = self._first, {}
        sums = [self._zero] * (3 * len(self._names))
        for index, seen in first.items():
            grad = self._parameters[index].grad
            if grad is None:
                continue
            own = seen.double() * len(sizes)  # its loss was divided by the number of micro-batches
            label = self._groups.labels[index] if self._groups.labels else 0
            found = (
                self._norm(index, own - grad) / self._factor(index),
                self._norm(index, own),
                self._norm(index, grad),
            )
            for position, value in enumerate(found):
                sums[position * len(self._names) + label] = sums[position * len(self._names) + label] + value
        equal = len(set(sizes)) == 1
        numbers = [sizes[0], float(sum(sizes)), 1.0] if equal else [torch.nan, torch.nan, 1.0]
        return torch.cat([torch.stack(sums), on_device(numbers, device=self._zero.device)])

    def _norm(self, index: int, grad: Tensor) -> Tensor:
        if self._kinds[index] == "sign":
            return grad.abs().sum(dtype=torch.float64)
        values: Tensor = torch.linalg.svdvals(grad.flatten(1).double())
        return values.sum()

    def _factor(self, index: int) -> float:
        if self._kinds[index] == "sign":
            return sign_factor()
        shape = self._parameters[index].shape
        return spectral_factor(shape[0], self._parameters[index].numel() // shape[0])

    def absorb(self, values: Sequence[float]) -> None:
        """Take in the sum over all ranks of one step's `vector`."""
        ranks, num = values[-1], len(self._names)
        deviation, small, large = ([x / ranks for x in values[i * num : (i + 1) * num]] for i in range(3))
        size, total = values[-3] / ranks, values[-2]
        entries = {"whole": (sum(deviation), sum(small), sum(large))}
        if self._groups.names:
            entries |= dict(zip(self._names, zip(deviation, small, large, strict=True), strict=True))
        for name, (noise, own, averaged) in entries.items():
            norms = DualNorms(small=own, large=averaged, deviation=noise, size=size, total=total)
            moments = dual_moments(norms)
            if moments is not None:
                self._sums[name] = self._smoothing.update(self._sums[name], moments)

    def read(self) -> NoiseScale:
        """Return the noise scale of all that is measured so."""
        return dual_noise_scale(smoothed(self._sums["whole"]), level=self._level)

    def read_groups(self) -> dict[str, NoiseScale]:
        """Return the noise scale of each group."""
        return {name: dual_noise_scale(smoothed(self._sums[name]), level=self._level) for name in self._groups.names}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {name: sums.to_json() for name, sums in self._sums.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._sums |= {name: MomentSums.from_json(sums) for name, sums in state.items() if name in self._sums}
