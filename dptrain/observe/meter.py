"""The meter: from a hook's squared norms and the averaged gradient to one reduction per measured step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.errors import ObservationError
from dptrain.noise import Smoothing, SquaredNorms
from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck
from dptrain.observe.checks.reasons import DropLog, Reason, reason_of_dropped
from dptrain.observe.checks.step_check import NUM_CHECK_VALUES, StepCheck
from dptrain.observe.estimate import NUM_SIZES, NUM_SUMS, Estimate
from dptrain.observe.geometry import Geometry, PlainGeometry
from dptrain.observe.geometry.dual import DualGeometry
from dptrain.observe.global_gradient import GlobalGradient, UnreducedGradient
from dptrain.observe.groups import Groups
from dptrain.observe.hooks.base import GradientHook
from dptrain.observe.hooks.join import JoinableMeter, check_step
from dptrain.observe.loop.arguments import LossScale
from dptrain.observe.loop.halves import HalfBatches
from dptrain.observe.loop.own_reduction import OwnReduction
from dptrain.observe.loop.passes import ForwardPasses
from dptrain.observe.loop.results import MeterResults
from dptrain.observe.loop.sizes import MicroBatchSizes, SizeVectors, checked_micro_batch
from dptrain.observe.measurement_interval import LAG, NUM_TIMINGS, MeasurementInterval
from dptrain.observe.reading import Reading
from dptrain.observe.step_reductions import StepReductions


class Meter(OwnReduction, MeterResults, JoinableMeter):
    """Measures the gradient noise scale of a model in training. Never changes a gradient.

    The loop calls `begin` before each micro-batch's forward pass, and `step` once per optimizer step: after the last
    backward pass and before clipping and `optimizer.step()`. `attach` makes a meter that announces by itself.
    All replicas make the same calls: `step` starts one all-reduce of a few scalars.

    Args:
        parameters: those that are trained; their `.grad` at `step` is the averaged gradient.
        hook: where the replica's own gradient is seen.
        group: process group over which gradients are averaged; None for the default one.
        loss_scale: factor on the loss at the time of `step`, such as a GradScaler's, or None for 1; a tensor is
            used on its device without a sync.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set if steps draw from it without replacement, see `unbiased_moments`.
        groups: parts of the model with a noise scale of their own; the hook must have the same.
        geometry: the norm; the hook must have the same.
        num_shards: ranks over which the averaged gradient is cut up.
        interval_rule: which steps are measured; each by default.
        duplicate_data_check: looks for replicas that are not independent; none by default.
        check: looks for steps whose gradients do not belong together; none by default.
        divisor: by what the sum over the ranks' gradients is divided; by default the number of replicas.
        ranks_per_replica: ranks that hold one copy of the model together (tensor parallelism, pipeline stages).
        halves: splits a micro-batch, where one process has no two of them.
        averaged: how the averaged gradient is read; by default from `.grad`.
        dual: dual norms that are measured too, and read in place of the squared ones; it needs `check`.
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
        duplicate_data_check: DuplicateDataCheck | None = None,
        check: StepCheck | None = None,
        divisor: float | None = None,
        ranks_per_replica: int = 1,
        halves: HalfBatches | None = None,
        averaged: GlobalGradient | UnreducedGradient | None = None,
        dual: DualGeometry | None = None,
    ) -> None:
        trained = [p for p in parameters if p.requires_grad]
        groups = groups or Groups()
        self._geometry = geometry or PlainGeometry(groups.rows)
        self._averaged = averaged or GlobalGradient(
            trained, groups=groups, geometry=self._geometry, num_shards=num_shards
        )
        JoinableMeter.__init__(self, device=trained[0].device, group=group, accumulated=hook.accumulated)
        self._device = trained[0].device
        self._num_entries = groups.num_entries
        self._num_groups = len(groups.names)
        self._hook = hook
        self._group = group
        self._world_size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
        self._loss_scale = loss_scale
        MeterResults.__init__(
            self,
            estimate=Estimate(
                names=groups.names,
                world_size=self._world_size,
                smoothing=smoothing,
                level=level,
                population=population,
            ),
            drops=DropLog(group) if check is None else check.log,
            duplicate_data_check=duplicate_data_check,
            dual=dual,
        )
        self._interval_rule = interval_rule or MeasurementInterval(every=1)
        self._check = check
        self._divisor = divisor
        self._share = 1 / ranks_per_replica
        self._halves = halves
        self._parameters = trained
        self._passes = ForwardPasses(self._drops)
        self._closed_by_optimizer = False
        self._sizes = MicroBatchSizes()
        self._size_vectors = SizeVectors(device=self._device, accumulated=hook.accumulated, share=self._share)
        self._measuring = self._interval_rule.next_is_measured()
        self._by_hand = False
        self._reductions = StepReductions(
            group=group,
            device=self._device,
            interval_rule=self._interval_rule,
            duplicate_data_check=duplicate_data_check,
            stopwatch=hook.stopwatch,
        )
        num_values = 2 * self._num_entries + NUM_SIZES + NUM_TIMINGS
        self._nothing = torch.zeros(num_values, dtype=torch.float64, device=self._device)
        if not self._measuring:
            hook.listen(on=False)
        self._closers: list[Callable[[], None]] = [hook.remove]
        if check is not None:
            hook.check_with(check.checksum)
        if dual is not None:
            hook.keep_first(dual.note)
        if check is not None and self._measuring:
            check.checksum.open()

    def begin(self, *, num_samples: float, weight: float | None = None) -> None:
        """Announce a micro-batch before its backward pass.

        From the first call on, a meter of `attach` counts no forward passes any more: the loop tells it all.

        Args:
            num_samples: b, the samples whose mean gradient it computes.
            weight: v, by which its mean loss is multiplied before the backward pass; by default an equal share,
                1/accumulation_steps. For the exact mean over samples of unequal micro-batches it is
                num_samples·world_size/global_batch_size. 0 for a filler, which is not looked at.
        """
        self._by_hand = True
        num_samples, weight = checked_micro_batch(num_samples, weight)
        self._begin(num_samples=num_samples, weight=weight, training=True)

    def begin_forward(self, *, num_samples: float, weight: float | None = None, training: bool = True) -> None:
        """Announce a micro-batch from its forward pass, in the loop's place; nothing once the loop calls `begin`."""
        if not self._by_hand:
            self._begin(num_samples=num_samples, weight=weight, training=training)

    def resize_last(self, *, num_samples: float, weight: float | None) -> None:
        """Correct the size of the micro-batch announced last, from the backward pass that has begun."""
        self._sizes.resize_last(num_samples=num_samples, weight=weight)

    def doubt_step(self, reason: Reason) -> None:
        """Know that the size of a micro-batch of the step under way is in doubt, so that it is dropped."""
        if self._check is not None:
            self._check.doubts.add(reason)

    def _begin(self, *, num_samples: float, weight: float | None, training: bool) -> None:
        self._passes.add(training=training)
        if not self._measuring or (self._halves is not None and self._halves.running):
            return
        if self._sizes.num_samples and self._hook.name != "unsharded parameters" and self._cleared():
            self.discard_step()
        if not self._sizes.num_samples:
            self._geometry.open()
        opened = self._hook.begin(ignore=weight == 0)
        if weight == 0:
            return
        if not opened:
            self._sizes.drop_last()
        self._sizes.add(num_samples=num_samples, weight=weight)

    def discard_step(self) -> None:
        """Forget the micro-batches of the step under way, for its gradients are thrown away; the step begins anew.

        For loops that compute gradients which no optimizer step uses: the first pass of SAM, an update that is skipped
        because of a spike, a step that is retried. Call it where they are cleared. It costs nothing, is no collective,
        and is needed only where the gradients are zeroed in place (`set_to_none=False`) or sharded: elsewhere the meter
        finds `.grad` gone at the next forward pass and does the same by itself.
        """
        self._sizes = MicroBatchSizes()
        self._passes.clear()
        self._reductions.discarded()
        self._hook.discard()
        if self._check is not None:
            self._check.forget()
        if self._dual is not None:
            self._dual.forget()

    def _cleared(self) -> bool:
        return all(p.grad is None for p in self._parameters)  # not asked of sharded ones, which are kept elsewhere

    def split(self, loss_of: Callable[..., Tensor], *batch: Any) -> None:  # noqa: ANN401 - whatever the loss takes
        """Give one process without accumulation two small batches to compare: the halves of the micro-batch.

        In a step that is measured it runs `loss_of` on each half of `batch`, forward and backward, without touching
        `.grad`, buffers or the random state; elsewhere it does nothing. A measured step then takes about twice its
        time, which counts towards the budget, so that few are measured. Call it anywhere between two steps.

        Args:
            loss_of: returns the mean loss over the samples that it is given, without a loss scale; it calls the model.
            batch: its arguments: tensors that begin with the samples, alone or nested; anything else is passed on.

        Raises:
            ObservationError: where the meter was not made by `attach`, there are several ranks, or fewer than two
                samples.
        """
        if self._halves is None or self._world_size > 1:
            raise ObservationError("split is for a meter of attach in one process: several ranks have small batches")
        if self._measuring:
            began = self._hook.stopwatch.start()
            self._hook.begin(ignore=True)
            self._geometry.open()
            self._halves.run(loss_of, batch)
            self._hook.stopwatch.stop(began)

    # One step

    def local_sums(self, *, grad_norm: Tensor | None = None) -> Tensor:
        """Return this replica's part of the step as a float64 vector to be summed over the replicas.

        For loops that have a reduction of their own to put it in, and measure each step: sum it over the replicas,
        hand it to `absorb`. Its length is `NUM_SUMS`, and two more for each group past the first. No host sync, no
        collective.

        Args:
            grad_norm: norm of the averaged gradient before clipping where the loop has it already; else it is
                computed from `.grad`.
        """
        sizes, self._sizes = self._sizes, MicroBatchSizes()
        if self._halves is not None and self._halves.ready:
            self._hook.discard()
            sizes, squares = self._halves.take()
        else:
            small = self._hook.collect(sizes.resolved_weights())
            squares = torch.cat([small, self._averaged.squares(grad_norm=grad_norm)]) / self._scale_of_loss() ** 2
        return torch.cat([squares, self._size_vectors.of(sizes)])

    def _scale_of_loss(self) -> float | Tensor:
        """Return the factor on the loss whose backward pass the loop runs; the loss given to `split` has none."""
        scale = 1.0 if self._loss_scale is None else self._loss_scale()
        return scale.to(self._device, torch.float64, non_blocking=True) if isinstance(scale, Tensor) else scale

    def absorb(self, sums: list[float]) -> SquaredNorms | None:
        """Take in the sum over all replicas of one step's `local_sums`.

        Returns:
            The step's squared norms, or None for a step that was dropped.
        """
        norms = self._estimate.absorb(sums, divisor=self._divisor_of(sums))
        if norms is None:
            self._drops.dropped(reason_of_dropped(sums, num_entries=self._num_entries))
        else:
            self._drops.measured()
        return norms

    def _divisor_of(self, sums: list[float]) -> float:
        # DDP divides by the ranks that still have samples only where Join was set so.
        if self.divides_by_active:
            return sums[-2]
        return self._world_size * self._share if self._divisor is None else self._divisor

    def _absorb_checked(self, sums: list[float], checks: list[float]) -> None:
        """Take in a step if its checks allow it, without the factor that they find on the averaged gradient."""
        if self._check is None:
            self.absorb(sums)
            return
        norms = self._estimate.norms_of(sums, divisor=self._divisor_of(sums))
        checks, dual = checks[:NUM_CHECK_VALUES], checks[NUM_CHECK_VALUES:]
        verdict = self._check.judge(checks, norms, ranks=sums[-2], divisor=self._divisor_of(sums))
        reason = verdict.reason
        if reason is None and self._dual is not None and verdict.rescaled:
            reason = Reason.RESCALED
        if reason is not None:
            self._estimate.drop()
            self._drops.dropped(reason)
            return
        large = slice(self._num_entries, 2 * self._num_entries)
        sums[large] = [x / verdict.factor**2 for x in sums[large]]
        if self.absorb(sums) is not None and self._dual is not None:
            self._dual.absorb(dual)

    @property
    def num_groups(self) -> int:
        """Parts of the model that have a noise scale of their own."""
        return self._num_groups

    def step(self, *, grad_norm: Tensor | None = None) -> Reading:
        """Close an optimizer step: call it after the last backward pass, before clipping. A collective.

        It does not wait, but for the other ranks' hosts at the first measured step. After clipping or unscaling it is
        right too: the factor between `.grad` and what the backward passes brought is measured and divided out. With
        attach(..., optimizer=) the optimizer's step closes it, and a call that follows only returns the reading.

        Args:
            grad_norm: norm of the averaged gradient before clipping; not used where the meter checks the gradients
                (`attach`), because a wrong one could not be noticed.
        """
        if self._closed_by_optimizer and not self._passes:
            return Reading(self, measured=False)
        check_step(self, num_micro_batches=len(self._sizes.num_samples))
        measured = self._measuring
        if measured:
            began = self._hook.stopwatch.start()
            vector, checks = self._closed_step(grad_norm if self._check is None else None)
            self._hook.stopwatch.stop(began)
            self._reduce(vector, checks)
        self._turn()
        return Reading(self, measured=measured)

    def _closed_step(self, grad_norm: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return this rank's sums and its part of the checks."""
        split, sizes = self._halves is not None and self._halves.ready, self._sizes
        if not split and not self._hook.end() and sizes.num_samples:
            sizes.drop_last()  # its loss was thrown away
        seen, outside = split or bool(sizes.num_samples) or self._by_hand, self._hook.outside and not split
        repeated = self._hook.repeated
        vector = self.local_sums(grad_norm=grad_norm)
        if self._check is None:
            return vector, None
        if split:
            return vector, self._check.empty(with_dual=self._dual)
        several = self._hook.squares, sizes.are_equal
        checks = self._check.vector(announced=seen, outside=outside, repeated=repeated, several=several)
        return vector, checks if self._dual is None else torch.cat([checks, self._dual.vector(sizes.num_samples)])

    def expect_optimizer(self) -> None:
        """Know that an optimizer closes the steps from now on."""
        self._closed_by_optimizer = True

    def close_by_optimizer(self) -> None:
        """Close the step unless the loop has done so itself, or another optimizer; a collective as `step`."""
        if self._passes:
            self.step()

    def _reduce(self, vector: Tensor, checks: Tensor | None) -> None:
        """Start the one reduction of a measured step, and take in those that are long under way."""
        own = vector[: self._num_entries].sum()
        self._reductions.start(vector if checks is None else torch.cat([vector, checks]), own_square=own)
        began = self._hook.stopwatch.start()
        self._absorb_up_to(LAG)
        self._hook.stopwatch.stop(began)
        self._interval_rule.close()

    def _turn(self) -> None:
        """Go over to the next step, which is measured or not."""
        self._passes.close()
        measured, self._measuring = self._measuring, self._interval_rule.next_is_measured()
        if not measured:
            self._interval_rule.skip()
            self._estimate.skip()
        if self._measuring and self._check is not None:
            self._check.checksum.open()
        if measured != self._measuring:
            self._hook.listen(on=self._measuring)

    def _absorb_up_to(self, num_left: int) -> None:
        num_sums = NUM_SUMS + 2 * (self._num_entries - 1)
        for values in self._reductions.arrived(num_left):
            self._absorb_checked(values[:num_sums], values[num_sums:])

    @property
    def num_replicas(self) -> int:
        """Replicas over which gradients are averaged, each of one rank or of several."""
        return round(self._world_size * self._share)

    @property
    def measuring(self) -> bool:
        """Whether the step under way is measured, known from its beginning on: else nothing need be done for it."""
        return self._measuring

    @property
    def accumulated(self) -> bool:
        """Whether a replica's accumulated gradient is seen, once per step, and not each micro-batch's."""
        return self._hook.accumulated

    def count_forward(self, *, training: bool = True) -> None:
        """Note a forward pass of a step that is not measured, in training or in evaluation mode."""
        self._passes.add(training=training)

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
        """The norm: "sgd", "adam", "sign", "spectral" or "mixed"."""
        return self._geometry.name if self._dual is None else self._dual.name

    @property
    def every(self) -> int:
        """Every how many steps one is measured, at present."""
        return self._interval_rule.every

    @property
    def share(self) -> float | None:
        """The share of the step time that measuring took so far, over all ranks; None before it is known."""
        return self._interval_rule.share

    def step_joined(self) -> None:
        """Answer the step of the ranks that go on, inside torch's Join; a collective on measured steps."""
        if self._measuring:
            self._hook.collect([])
            num_values = 2 * self._num_entries + NUM_SIZES
            zeros = torch.zeros(num_values, dtype=torch.float64, device=self._device)
            self._reduce(zeros, None if self._check is None else self._check.empty(with_dual=self._dual))
        self._turn()

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
