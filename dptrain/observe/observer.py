"""The meter for loops in which no hook can see the gradient: the loop hands over squared norms with their sizes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.errors import ObservationError
from dptrain.noise import NoiseScale, Resolution, Smoothing
from dptrain.observe.estimate import Estimate, from_record, to_record
from dptrain.observe.loop.sizes import MicroBatchSizes
from dptrain.observe.measurement_interval import LAG
from dptrain.observe.reading import Reading
from dptrain.observe.reduction import PendingSum, on_device


class Observer:
    """Takes squared norms by hand and gives the same reading as a meter.

    For loops that reduce gradients themselves, such as by reduce-scatter into the optimizer's shards, so that the
    averaged gradient never exists whole.

    ```python
    observer = dptrain.Observer()
    own = sum(p.grad.float().square().sum() for p in model.parameters())      # before the reduction
    share = sum(shard.float().square().sum() for shard in averaged_shards)    # after it
    reading = observer.observe([own], sizes=[samples_on_this_rank], large_sq_norm=share)
    ```

    Args:
        group: process group over which gradients are averaged; None for the default one.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set where it is small and drawn without replacement.
    """

    geometry = "sgd"
    identical_ranks: tuple[tuple[int, ...], ...] = ()

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        smoothing: Smoothing | None = None,
        level: float = 0.95,
        population: int | None = None,
    ) -> None:
        self._group = group
        self._world_size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._estimate = Estimate(world_size=self._world_size, smoothing=smoothing, level=level, population=population)
        self._pending: deque[PendingSum] = deque()

    def observe(
        self,
        small_sq_norms: Sequence[Tensor | float],
        *,
        sizes: Sequence[float],
        large_sq_norm: Tensor | float,
        weights: Sequence[float] | None = None,
    ) -> Reading:
        """Take in one step. A collective: all ranks call it, each with its own part; no wait.

        Args:
            small_sq_norms: ‖g_k‖² of each small batch of this rank, g_k being the mean over its samples.
            sizes: samples in each.
            large_sq_norm: this rank's share of ‖g‖²: the squares of that part of the averaged gradient which this
                rank holds. The shares of all ranks add up to ‖g‖²; where each holds it whole, give ‖g‖²/world_size.
            weights: v of each, as in `Meter.begin`; equal shares by default.

        Raises:
            ObservationError: where the lengths differ or a size is not positive.
        """
        given: list[float | None] = [None] * len(sizes) if weights is None else list(weights)
        if not len(small_sq_norms) == len(sizes) == len(given) or any(not size > 0 for size in sizes):
            raise ObservationError(
                f"got {len(small_sq_norms)} squared norms with sizes {list(sizes)} and weights {weights}: each small "
                "batch needs one of each, and a positive size"
            )
        own = MicroBatchSizes(num_samples=list(sizes), weights=given)
        resolved = own.resolved_weights()
        device = next(
            (x.device for x in (large_sq_norm, *small_sq_norms) if isinstance(x, Tensor)), torch.device("cpu")
        )
        squares = [_scalar(x, device=device) for x in small_sq_norms]
        zero = torch.zeros((), dtype=torch.float64, device=device)
        small = sum((x * v for x, v in zip(squares, resolved, strict=True)), zero)
        large = _scalar(large_sq_norm, device=device) * self._world_size
        numbers = on_device(own.sums(accumulated=False), device=device)
        vector = torch.cat([torch.stack([small, large]), numbers])
        self._pending.append(PendingSum(vector, group=self._group))
        self._absorb_up_to(LAG)
        return Reading(self)

    def _absorb_up_to(self, num_left: int) -> None:
        while len(self._pending) > num_left:
            self._estimate.absorb(self._pending.popleft().read())

    def read(self) -> NoiseScale:
        """Return the noise scale from all steps up to now; waits for the sums under way."""
        self._absorb_up_to(0)
        return self._estimate.read()

    def read_groups(self) -> dict[str, NoiseScale]:
        """Return nothing: only the whole is handed over."""
        return {}

    @property
    def reason(self) -> str | None:
        """Why there is no number; None where there is one."""
        scale, dropped = self.read(), self.steps_dropped
        if scale.state in (Resolution.RESOLVED, Resolution.AT_LEAST):
            return None
        if scale.state is Resolution.INCONSISTENT:
            return "inconsistent: tr(Σ) is far below zero; check the sizes, the weights and what large_sq_norm holds"
        return f"too early: {scale.num_steps} steps measured, {dropped} dropped (not finite, or one small batch)"

    @property
    def steps_dropped(self) -> int:
        """Steps without a measurement: squared norms not finite, fewer than two small batches; waits as `read` does."""
        self._absorb_up_to(0)
        return self._estimate.steps_dropped

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; waits for the sums under way."""
        self._absorb_up_to(0)
        return to_record(self._estimate.state)

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; the sums under way belong to what is left behind, and are waited for."""
        self._absorb_up_to(0)
        self._estimate.restore(from_record(record))


def _scalar(value: Tensor | float, *, device: torch.device) -> Tensor:
    """Return a float64 scalar on the device, without a wait where the value is a number of the host."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), value, dtype=torch.float64, device=device)
