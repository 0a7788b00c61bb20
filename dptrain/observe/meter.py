"""The meter: from a hook's squared norms and the combined gradient to one reduction per measured step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook

from dptrain.noise import NoiseScale, Smoothing, SquaredNorms
from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck
from dptrain.observe.estimate import NUM_SIZES, Estimate, MeterState, from_record, to_record
from dptrain.observe.geometry import Geometry, PlainGeometry
from dptrain.observe.global_gradient import GlobalGradient
from dptrain.observe.groups import Groups
from dptrain.observe.hooks.base import GradientHook
from dptrain.observe.hooks.join import JoinedRank, check_divisor, check_step
from dptrain.observe.measurement_interval import LAG, NUM_TIMINGS, MeasurementInterval
from dptrain.observe.reading import Reading
from dptrain.observe.reduction import PendingSum, on_device
from dptrain.observe.sizes import MicroBatchSizes

LossScale = Callable[[], float | Tensor]

_UNSEEN = {"cpu": 1.2}
"""What measuring costs to what its own clock shows, by kind of device: on a CPU the norms push from the caches what the
model's kernels then fetch again. In trials over the models of `benchmarks.overhead` it was 1.04 to 1.22."""
_MAX_SIZE_VECTORS = 64


class Meter(Joinable):
    """Measures the gradient noise scale of a model in training. Never changes a gradient.

    The loop calls `begin` before each micro-batch's forward pass, and `step` once per optimizer step: after the last
    backward pass and before clipping and `optimizer.step()`. `attach` makes a meter that announces by itself.
    All replicas make the same calls: `step` starts one all-reduce of a few scalars.

    Args:
        parameters: those that are trained; their `.grad` at `step` is the combined gradient.
        hook: where the replica's own gradient is seen.
        group: process group over which gradients are averaged; None for the default one.
        loss_scale: factor on the loss at the time of `step`, such as a GradScaler's, or None for 1; a tensor is
            used on its device without a sync.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set if steps draw from it without replacement, see `unbiased_moments`.
        groups: parts of the model with a noise scale of their own; the hook must have the same.
        geometry: the norm; the hook must have the same.
        num_shards: ranks over which the combined gradient is cut up.
        pace: which steps are measured; each by default.
        guard: looks for replicas that are not independent; nobody by default.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        hook: GradientHook,
        group: dist.ProcessGroup | None = None,
        loss_scale: LossScale | None = None,
        smoothing: Smoothing | None = None,
        level: float = 0.95,
        population: int | None = None,
        groups: Groups | None = None,
        geometry: Geometry | None = None,
        num_shards: int = 1,
        interval_rule: MeasurementInterval | None = None,
        guard: DuplicateDataCheck | None = None,
    ) -> None:
        super().__init__()
        trained = [p for p in parameters if p.requires_grad]
        groups, self._geometry = groups or Groups(), geometry or PlainGeometry()
        self._combined = GlobalGradient(trained, groups=groups, geometry=self._geometry, num_shards=num_shards)
        self._device = trained[0].device
        self._num_entries = groups.num_entries
        self._num_groups = len(groups.names)
        self._hook = hook
        self._group = group
        self._world_size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._loss_scale = loss_scale
        self._estimate = Estimate(
            names=groups.names,
            world_size=self._world_size,
            smoothing=smoothing,
            level=level,
            population=population,
        )
        self._interval_rule = interval_rule or MeasurementInterval(every=1)
        self._guard = guard
        self._sizes = MicroBatchSizes()
        self._size_vectors: dict[tuple[float, ...], Tensor] = {}
        self._measuring = self._interval_rule.next_is_measured()
        self._num_closed = 0
        self._by_hand = False
        self._divides_by_active = False
        self._pending: deque[tuple[PendingSum, PendingSum | None]] = deque()
        num_values = 2 * self._num_entries + NUM_SIZES + NUM_TIMINGS
        self._nothing = torch.zeros(num_values, dtype=torch.float64, device=self._device)
        if not self._measuring:
            hook.listen(on=False)
        self._closers: list[Callable[[], None]] = [hook.remove]

    # One micro-batch

    def begin(self, *, num_samples: float, weight: float | None = None) -> None:
        """Announce a micro-batch before its backward pass.

        From the first call on, a meter of `attach` counts no forward passes any more: the loop passes everything.

        Args:
            num_samples: b, the samples whose mean gradient it computes.
            weight: v, by which its mean loss is multiplied before the backward pass; by default an equal share,
                1/accumulation_steps. For the exact mean over samples of unequal micro-batches it is
                num_samples·world_size/global_batch_size. 0 for a filler, which is not looked at.
        """
        self._by_hand = True
        self._begin(num_samples=num_samples, weight=weight)

    def begin_forward(self, *, num_samples: float, weight: float | None = None) -> None:
        """Announce a micro-batch from its forward pass, in the loop's place; nothing once the loop calls `begin`."""
        if not self._by_hand:
            self._begin(num_samples=num_samples, weight=weight)

    def _begin(self, *, num_samples: float, weight: float | None) -> None:
        if not self._measuring:
            return
        if not self._sizes.num_samples:
            self._geometry.open()
        opened = self._hook.begin(ignore=weight == 0)
        if weight == 0:
            return
        if not opened:
            self._sizes.drop_last()
        self._sizes.add(num_samples=num_samples, weight=weight)

    def discard_step(self) -> None:
        """Forget the micro-batches of the step under way: it begins anew, because its gradients were lost."""
        self._sizes = MicroBatchSizes()
        self._hook.discard()

    # One step

    def local_sums(self, *, grad_norm: Tensor | None = None) -> Tensor:
        """Return this replica's part of the step as a float64 vector to be summed over the replicas.

        For loops that have a reduction of their own to put it in, and measure each step: sum it over the replicas,
        hand it to `absorb`. Its length is `NUM_SUMS`, and two more for each group past the first. No host sync, no
        collective.

        Args:
            grad_norm: norm of the combined gradient before clipping where the loop has it already; else it is
                computed from `.grad`.
        """
        sizes, self._sizes = self._sizes, MicroBatchSizes()
        small = self._hook.collect(sizes.resolved_weights())
        squares = torch.cat([small, self._combined.squares(grad_norm=grad_norm)])
        if self._loss_scale is not None:
            squares = squares / torch.as_tensor(self._loss_scale(), dtype=torch.float64, device=self._device) ** 2
        return torch.cat([squares, self._size_vector(sizes)])

    def _size_vector(self, sizes: MicroBatchSizes) -> Tensor:
        # Sizes rarely change, so their copy to the device is kept: a fresh one each step would be a transfer each.
        values = sizes.sums(accumulated=self._hook.accumulated)
        if values not in self._size_vectors:
            if len(self._size_vectors) >= _MAX_SIZE_VECTORS:
                self._size_vectors.clear()
            self._size_vectors[values] = on_device(values, device=self._device)
        return self._size_vectors[values]

    def absorb(self, sums: list[float]) -> SquaredNorms | None:
        """Take in the sum over all replicas of one step's `local_sums`.

        Returns:
            The step's squared norms, or None for a step that was dropped.
        """
        # DDP divides by the ranks that still have samples only if Join was configured so.
        divisor = sums[-2] if self._divides_by_active else float(self._world_size)
        return self._estimate.absorb(sums, divisor=divisor)

    def close_step(self, *, grad_norm: Tensor | None = None) -> tuple[Tensor, bool]:
        """Close an optimizer step in a loop that has a reduction of its own. No host sync, no collective.

        Args:
            grad_norm: as for `local_sums`.

        Returns:
            A float64 vector of `num_sums` entries to be summed over the replicas and handed to `absorb_step`, in the
            order of the steps and before the third measured step from there on is closed; and whether the step was
            measured. If not, the vector is zero.
        """
        measured = self._measuring
        vector = self._nothing
        if measured:
            stopwatch = self._hook.stopwatch
            began = stopwatch.start()
            sums = self.local_sums(grad_norm=grad_norm)
            stopwatch.stop(began)
            cost_s = stopwatch.take() * _UNSEEN.get(self._device.type, 1.0)
            vector = torch.cat([sums, on_device(self._interval_rule.timing(cost_s), device=self._device)])
            self._interval_rule.close()
        self._turn()
        return vector, measured

    def absorb_step(self, sums: list[float], *, usable: bool) -> None:
        """Take in the sum over all replicas of a measured step's `close_step`.

        Args:
            sums: as `close_step` gave them, summed.
            usable: whether the combined gradient was finite; if not, only the timing counts.
        """
        if usable:
            self.absorb(sums[:-NUM_TIMINGS])
        self._interval_rule.note(sums[-NUM_TIMINGS:])

    def align(self, step: int) -> None:
        """Go on after so many steps of a run: a fixed interval measures the steps that it would have measured."""
        self._interval_rule.align(step)
        self._measuring = self._interval_rule.next_is_measured()
        self._hook.listen(on=self._measuring)

    @property
    def num_groups(self) -> int:
        """Parts of the model that have a noise scale of their own."""
        return self._num_groups

    @property
    def num_sums(self) -> int:
        """Length of the vector of `close_step`."""
        return len(self._nothing)

    def step(self, *, grad_norm: Tensor | None = None) -> Reading:
        """Close an optimizer step: call it after the last backward pass, before clipping. A collective; no wait.

        Args:
            grad_norm: norm of the combined gradient before clipping where the loop has it already.
        """
        check_step(self, num_micro_batches=len(self._sizes.num_samples))
        measured = self._measuring
        if measured:
            began = self._hook.stopwatch.start()
            vector = self.local_sums(grad_norm=grad_norm)
            self._hook.stopwatch.stop(began)
            self._reduce(vector)
        self._turn()
        return Reading(self, measured=measured)

    def _reduce(self, vector: Tensor) -> None:
        """Start the one reduction of a measured step, and take in those that are long under way."""
        stopwatch = self._hook.stopwatch
        own = vector[: self._num_entries].sum()
        cost_s = stopwatch.take() * _UNSEEN.get(self._device.type, 1.0)
        timing = on_device(self._interval_rule.timing(cost_s), device=self._device)
        began = stopwatch.start()
        pending = PendingSum(torch.cat([vector, timing]), group=self._group)
        self._num_closed += 1
        squares = None if self._guard is None else self._guard.exchange(own, number=self._num_closed)
        self._pending.append((pending, squares))
        self._absorb_up_to(LAG)
        stopwatch.stop(began)
        self._interval_rule.close()

    def _turn(self) -> None:
        """Go over to the next step, which is measured or not."""
        measured, self._measuring = self._measuring, self._interval_rule.next_is_measured()
        if not measured:
            self._interval_rule.skip()
            self._estimate.skip()
        if measured != self._measuring:
            self._hook.listen(on=self._measuring)

    def _absorb_up_to(self, num_left: int) -> None:
        while len(self._pending) > num_left:
            pending, squares = self._pending.popleft()
            values = pending.read()
            self.absorb(values[:-NUM_TIMINGS])
            self._interval_rule.note(values[-NUM_TIMINGS:])
            if squares is not None and self._guard is not None:
                self._guard.judge(squares.read())

    def read(self) -> NoiseScale:
        """Return the noise scale now; waits for the sums under way."""
        self._absorb_up_to(0)
        return self._estimate.read()

    def read_window(self) -> NoiseScale:
        """Return the noise scale of the means over the window; waits for the sums under way."""
        self._absorb_up_to(0)
        return self._estimate.read_window()

    def read_groups(self) -> dict[str, NoiseScale]:
        """Return the noise scale of each group over the window; waits for the sums under way."""
        self._absorb_up_to(0)
        return self._estimate.read_groups()

    # What it is

    @property
    def num_replicas(self) -> int:
        """Replicas over which gradients are averaged."""
        return self._world_size

    @property
    def measuring(self) -> bool:
        """Whether the step under way is measured, known from its beginning on: else nothing need be done for it."""
        return self._measuring

    @property
    def by_hand(self) -> bool:
        """Whether the loop announces its micro-batches itself: from its first call of `begin` on."""
        return self._by_hand

    @property
    def method(self) -> str:
        """Where gradients are seen: "parameters", "unsharded parameters" or "hook"."""
        return self._hook.name

    @property
    def geometry(self) -> str:
        """The norm: "sgd" or "adam"."""
        return self._geometry.name

    @property
    def every(self) -> int:
        """Every how many steps one is measured, at present."""
        return self._interval_rule.every

    @property
    def share(self) -> float | None:
        """The share of the step time that measuring took so far, over all ranks; None before it is known."""
        return self._interval_rule.share

    @property
    def identical_ranks(self) -> tuple[tuple[int, ...], ...]:
        """Sets of ranks whose gradients were found equal to the last bit; waits for the sums under way."""
        self._absorb_up_to(0)
        return () if self._guard is None else self._guard.identical_ranks

    @property
    def steps_dropped(self) -> int:
        """Steps that told nothing: squared norms not finite, fewer than two small batches; waits as `read` does."""
        self._absorb_up_to(0)
        return self._estimate.steps_dropped

    # State

    def state(self) -> MeterState:
        """Return what a checkpoint must hold; waits for the sums under way."""
        self._absorb_up_to(0)
        return self._estimate.state

    def restore(self, state: MeterState) -> None:
        """Go on from `state`; the sums under way belong to what is left behind, and are waited for."""
        self._absorb_up_to(0)
        self._estimate.restore(state)

    def state_dict(self) -> dict[str, Any]:
        """Return `state` in the form that torch and the frameworks save."""
        return to_record(self.state())

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.restore(from_record(record))

    # Uneven inputs: torch's Join calls these

    def join_hook(self, **kwargs: Any) -> JoinHook:  # noqa: ANN401 - torch hands every joinable the same arguments
        """Return what answers for a rank that ran out of samples."""
        self._divides_by_active = not kwargs.get("divide_by_initial_world_size", True)
        check_divisor(by_active=self._divides_by_active, accumulated=self._hook.accumulated)
        return JoinedRank(self)

    @property
    def join_device(self) -> torch.device:
        """Where its collectives run."""
        return self._device

    @property
    def join_process_group(self) -> Any:  # noqa: ANN401 - torch leaves it without a type
        """Over whom they run."""
        return self._group

    def step_joined(self) -> None:
        """Answer the step of the ranks that go on; a collective on measured steps."""
        if self._measuring:
            self._hook.collect([])
            num_values = 2 * self._num_entries + NUM_SIZES
            self._reduce(torch.zeros(num_values, dtype=torch.float64, device=self._device))
        self._turn()

    # Life

    def on_remove(self, close: Callable[[], None]) -> None:
        """Have `close` called by `remove`."""
        self._closers.append(close)

    def remove(self, *, wait: bool = True) -> None:
        """Take everything off the model; the meter can still be read.

        Args:
            wait: for the sums under way. A rank that then ends, or destroys its process group, takes none of them away
                from those that still read. Not after an error, for other ranks may never come.
        """
        while self._closers:
            self._closers.pop()()
        if wait and dist.is_available() and dist.is_initialized():  # else there is nobody left to wait for
            self._absorb_up_to(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.remove(wait=kind is None)
