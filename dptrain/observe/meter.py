"""The meter: from a tap's squared norms and the combined gradient to the running noise scale."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.errors import ObservationError
from dptrain.noise import MomentSums, NoiseScale, Smoothing, SquaredNorms, noise_scale, smoothed, unbiased_moments
from dptrain.observe.reduction import PendingSum
from dptrain.observe.sizes import MicroBatchSizes
from dptrain.observe.tap import Tap

LossScale = Callable[[], float | Tensor]

# Steps whose sums may wait unread. By then the oldest has long arrived, so that absorbing it stalls nothing.
_MAX_PENDING = 64


@dataclass(frozen=True, kw_only=True)
class MeterState:
    """What a checkpoint must hold of a meter."""

    sums: MomentSums
    steps_measured: int
    steps_dropped: int


class Reading:
    """What is known after a step. Looking at it waits for the sums under way; not looking costs nothing."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    @property
    def noise_scale(self) -> NoiseScale:
        """The noise scale with its interval, from all steps measured up to now (synchronises the device)."""
        return self._meter.read()

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `gns/…` for any logger; ends that are open are left out."""
        scale = self.noise_scale
        found = {
            "gns/b_simple": scale.value,
            "gns/lower": scale.lower,
            "gns/upper": scale.upper,
            "gns/grad_sq": scale.grad_sq_norm,
            "gns/trace": scale.noise_trace,
        }
        return {name: value for name, value in found.items() if value is not None and value != float("inf")}


class Meter:
    """Measures the gradient noise scale of a model in training. Never changes a gradient.

    The loop calls `begin` before each micro-batch's forward pass, and `step` once per optimizer step: after the last
    backward pass and before clipping and `optimizer.step()`. `attach` makes a meter that calls `begin` by itself.
    All replicas make the same calls: `step` starts one all-reduce of a few scalars.

    Args:
        parameters: those that are trained; their `.grad` at `step` is the combined gradient.
        tap: where the replica's own gradient is seen.
        group: process group over which gradients are averaged; None for the default one.
        loss_scale: factor on the loss at the time of `step`, such as a GradScaler's, or None for 1; a tensor is
            used on its device without a sync.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set if steps draw from it without replacement, see `unbiased_moments`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        tap: Tap,
        group: dist.ProcessGroup | None = None,
        loss_scale: LossScale | None = None,
        smoothing: Smoothing | None = None,
        level: float = 0.95,
        population: int | None = None,
    ) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._device = self._parameters[0].device
        self._tap = tap
        self._group = group
        self._world_size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._loss_scale = loss_scale
        self._smoothing = smoothing or Smoothing()
        self._level = level
        self._population = population
        self._sizes = MicroBatchSizes()
        self._size_vectors: dict[tuple[float, ...], Tensor] = {}
        self._sums = MomentSums()
        self._steps_measured = 0
        self._steps_dropped = 0
        self._pending: deque[PendingSum] = deque()
        self._closers: list[Callable[[], None]] = [tap.remove]

    # One micro-batch

    def begin(self, *, num_samples: float, weight: float | None = None) -> None:
        """Announce a micro-batch before its backward pass.

        Args:
            num_samples: b, the samples whose mean gradient it computes.
            weight: v, by which its mean loss is multiplied before the backward pass; by default an equal share,
                1/accumulation_steps. For the exact mean over samples of unequal micro-batches it is
                num_samples·world_size/global_batch_size. 0 for a filler, which is not looked at.
        """
        opened = self._tap.begin(ignore=weight == 0)
        if weight == 0:
            return
        if not opened:
            self._sizes.drop_last()
        self._sizes.add(num_samples=num_samples, weight=weight)

    # One step

    def local_sums(self, *, grad_norm: Tensor | None = None) -> Tensor:
        """Return this replica's part of the step as a float64 vector to be summed over the replicas.

        For loops that have a reduction of their own to put it in: sum it over the replicas, hand it to `absorb`.
        Its length is `NUM_SUMS`. No host sync, no collective.

        Args:
            grad_norm: norm of the combined gradient before clipping where the loop has it already; else it is
                computed from `.grad`.
        """
        sizes, self._sizes = self._sizes, MicroBatchSizes()
        small = self._tap.collect(sizes.resolved_weights())
        if grad_norm is None:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        large = grad_norm.to(self._device, torch.float64).square()
        squares = torch.stack([small, large])
        if self._loss_scale is not None:
            squares = squares / torch.as_tensor(self._loss_scale(), dtype=torch.float64, device=self._device) ** 2
        return torch.cat([squares, self._size_vector(sizes)])

    def _size_vector(self, sizes: MicroBatchSizes) -> Tensor:
        # Sizes rarely change, so their copy to the device is kept: a fresh one each step would be a transfer each.
        values = sizes.sums(accumulated=self._tap.accumulated)
        if values not in self._size_vectors:
            if len(self._size_vectors) >= _MAX_PENDING:
                self._size_vectors.clear()
            self._size_vectors[values] = torch.tensor(values, dtype=torch.float64, device=self._device)
        return self._size_vectors[values]

    def absorb(self, sums: list[float]) -> SquaredNorms | None:
        """Take in the sum over all replicas of one step's `local_sums`.

        Returns:
            The step's squared norms, or None for a step that measured nothing.
        """
        norms = _squared_norms(sums, world_size=self._world_size)
        moments = None if norms is None else unbiased_moments(norms, population=self._population)
        if moments is None:
            self._steps_dropped += 1
        else:
            self._steps_measured += 1
            self._sums = self._smoothing.update(self._sums, moments)
        return norms

    def step(self, *, grad_norm: Tensor | None = None) -> Reading:
        """Close an optimizer step: call it after the last backward pass, before clipping. A collective; no wait."""
        self._pending.append(PendingSum(self.local_sums(grad_norm=grad_norm), group=self._group))
        if len(self._pending) > _MAX_PENDING:
            self.absorb(self._pending.popleft().read())
        return Reading(self)

    def read(self) -> NoiseScale:
        """Return the noise scale from all steps up to now; waits for the sums under way."""
        while self._pending:
            self.absorb(self._pending.popleft().read())
        return noise_scale(smoothed(self._sums), level=self._level)

    # State

    @property
    def seam(self) -> str:
        """Where gradients are seen: "parameters" or "hook"."""
        return self._tap.name

    @property
    def steps_dropped(self) -> int:
        """Steps whose squared norms were not finite, or that held fewer than two small batches."""
        return self._steps_dropped

    def state(self) -> MeterState:
        """Return what a checkpoint must hold; waits for the sums under way."""
        self.read()
        return MeterState(sums=self._sums, steps_measured=self._steps_measured, steps_dropped=self._steps_dropped)

    def restore(self, state: MeterState) -> None:
        """Go on from `state`."""
        self._sums = state.sums
        self._steps_measured = state.steps_measured
        self._steps_dropped = state.steps_dropped

    def state_dict(self) -> dict[str, Any]:
        """Return `state` in the form that torch and the frameworks save."""
        state = self.state()
        return {
            "sums": state.sums.to_json(),
            "steps_measured": state.steps_measured,
            "steps_dropped": state.steps_dropped,
        }

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        try:
            state = MeterState(
                sums=MomentSums.from_json(record["sums"]),
                steps_measured=int(record["steps_measured"]),
                steps_dropped=int(record["steps_dropped"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ObservationError(f"not the state of a meter: {error}") from error
        self.restore(state)

    # Life

    def on_remove(self, close: Callable[[], None]) -> None:
        """Have `close` called by `remove`."""
        self._closers.append(close)

    def remove(self) -> None:
        """Take everything off the model; the meter can still be read."""
        while self._closers:
            self._closers.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


NUM_SUMS = 7
"""Length of the vector of `Meter.local_sums`."""


def _squared_norms(sums: list[float], *, world_size: int) -> SquaredNorms | None:
    """Turn the sums over all replicas into squared norms with their sizes.

    With weights v_k and V = Σ v_k the combined gradient is (V/world_size)·Σ (v_k/V)·g_k.
    """
    small, large, inverse, inverse_square, weight, count, samples = sums
    if weight <= 0:
        return None
    return SquaredNorms(
        small=small / weight,
        # Each replica put in the norm of the same combined gradient.
        large=large * world_size / (weight * weight),
        inverse_small=inverse / weight,
        inverse_large=inverse_square / (weight * weight),
        num_small=round(count),
        num_samples=samples,
    )
