"""The sizes and weights of one replica's micro-batches since the last optimizer step; no gradient lives here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TypeGuard

import torch
from torch import Tensor

from dptrain.error_text import shown
from dptrain.errors import ObservationError
from dptrain.observe.reduction import on_device

_MAX_VECTORS = 64


@dataclass(kw_only=True)
class MicroBatchSizes:
    """What a replica knows of its own micro-batches of one step, on the host.

    The gradient of micro-batch m of replica r enters the averaged gradient as v_rm·g_rm/world_size, where g_rm
    is the mean over its b_rm samples. Only ratios of the v matter for the noise scale; their sum over all
    replicas, divided by the world size, is the factor by which the averaged gradient differs from a mean.

    Attributes:
        num_samples: b of each micro-batch.
        weights: v of each micro-batch.
    """

    num_samples: list[float] = field(default_factory=list)
    weights: list[float | None] = field(default_factory=list)

    def add(self, *, num_samples: float, weight: float | None) -> None:
        """Note one micro-batch; a weight of None is an equal share of the replica's step, known at its end."""
        self.num_samples.append(num_samples)
        self.weights.append(weight)

    def resize_last(self, *, num_samples: float, weight: float | None) -> None:
        """Give the latest micro-batch another size: the backward pass is that of another forward pass."""
        if self.num_samples:
            self.num_samples[-1], self.weights[-1] = num_samples, weight

    def drop_last(self) -> None:
        """Forget the latest micro-batch: it had no backward pass."""
        self.num_samples.pop()
        self.weights.pop()

    def resolved_weights(self) -> list[float]:
        """Return v of each micro-batch, now that their number is known."""
        share = 1 / max(len(self.weights), 1)
        return [share if weight is None else weight for weight in self.weights]

    @property
    def are_equal(self) -> bool:
        """Whether there are several micro-batches, of equal size and weight: any could stand in another's place."""
        pairs = set(zip(self.num_samples, self.weights, strict=True))
        return len(self.num_samples) > 1 and len(pairs) == 1

    def sums(self, *, accumulated: bool) -> tuple[float, ...]:
        """Return (Σ v/b, Σ v²/b, Σ v, number of small batches, 1 for this replica, Σ b).

        Args:
            accumulated: the replica's gradient is seen once, after accumulation: then it is one small batch,
                whose weight is Σ v and whose noise is Σ v²/b over (Σ v)².
        """
        weights = self.resolved_weights()
        pairs = list(zip(self.num_samples, weights, strict=True))
        total = sum(weights)
        square = sum(v * v / b for b, v in pairs)
        if accumulated:
            return square / total if total else 0.0, square, total, float(total > 0), 1.0, sum(self.num_samples)
        return sum(v / b for b, v in pairs), square, total, float(len(pairs)), 1.0, sum(self.num_samples)


def checked_micro_batch(num_samples: object, weight: object) -> tuple[float, float | None]:
    """Return size and weight of a micro-batch that a loop announced; a filler, of weight 0, may have no samples.

    Raises:
        ObservationError: where one of them is no such number.
    """
    weight = checked_weight(weight)
    return 0.0 if weight == 0 else checked_size(num_samples, given_by="meter.begin"), weight


def checked_size(size: object, *, given_by: str) -> float:
    """Return a number of samples that a function or a loop gave.

    Args:
        size: what was given; a tensor of one element on the host counts as its number.
        given_by: how the error names its origin.

    Raises:
        ObservationError: where it is not a positive number.
    """
    if isinstance(size, Tensor) and size.device.type == "cpu" and size.numel() == 1:
        size = size.item()
    if not is_real(size) or not 0 < size < math.inf:
        raise ObservationError(
            f"{given_by} gave {shown(size)} as the samples of a micro-batch: give a positive number of the host, such "
            "as len(x)"
        )
    return size


def checked_weight(weight: object) -> float | None:
    """Return the weight of a micro-batch that a loop gave.

    Raises:
        ObservationError: where it is neither None nor a number that is not negative.
    """
    if weight is None:
        return None
    if not is_real(weight) or not 0 <= weight < math.inf:
        raise ObservationError(
            f"the weight of a micro-batch must be a number that is not negative, by which its mean loss is multiplied, "
            f"got {shown(weight)}"
        )
    return weight


def is_real(value: object) -> TypeGuard[float]:
    """Say whether a value is a number of the host; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: object) -> TypeGuard[int]:
    """Say whether a value is a whole number, at least 1; True is none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


class SizeVectors:
    """Brings the sizes of a step to the device, and keeps what it brought.

    Sizes rarely change; a fresh vector each step would be a transfer each.

    Args:
        device: where to.
        accumulated: see `MicroBatchSizes.sums`.
        share: of a replica that a rank is.
    """

    def __init__(self, *, device: torch.device, accumulated: bool, share: float) -> None:
        self._device = device
        self._accumulated = accumulated
        self._share = share
        self._vectors: dict[tuple[float, ...], Tensor] = {}

    def of(self, sizes: MicroBatchSizes) -> Tensor:
        """Return `sizes.sums` as a float64 vector."""
        values = tuple(x * self._share for x in sizes.sums(accumulated=self._accumulated))
        if values not in self._vectors:
            if len(self._vectors) >= _MAX_VECTORS:
                self._vectors.clear()
            self._vectors[values] = on_device(values, device=self._device)
        return self._vectors[values]
