"""One optimizer step, as the algorithm would stand in a paper; when and on what to step is the trainer's business."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dptrain.cost.flops import FlopCounter, uncompiled
from dptrain.data import MicroBatchLoader
from dptrain.data.source import seed_generators
from dptrain.errors import OutOfMemoryError, TaskError
from dptrain.exchange import Exchange, RunningStatistics
from dptrain.observe import Meter, PendingSum
from dptrain.observe.stopwatch import Stopwatch
from dptrain.runtime.replica import num_replicas, rank_of_replica
from dptrain.runtime.step_reduction import RankReport, StepRecord, send
from dptrain.tasks.base import Batch, LossFunction, split_training_loss
from dptrain.train.execution.device_copy import DeviceCopy
from dptrain.train.execution.step_buffers import StepBuffers
from dptrain.train.execution.update import Update
from dptrain.train.execution.wrapping import defer_combining, is_sharded
from dptrain.train.memory import release_memory, split


class Stepper:
    """Holds what a step works on, and takes steps.

    Args:
        model: the wrapped model.
        loss: mean loss of a micro-batch.
        exchange: what replicas send one another.
        update: what makes parameters of gradients.
        meter: sees the gradients.
        loader: gives this replica's micro-batches.
        device: of this replica.
        statistics: of the model's batch norms.
        precision: makes the context of a forward pass.
        flops: counts passes.
        seed_forward: seeds the generators for the forward pass that begins at a position in the stream.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        loss: LossFunction,
        exchange: Exchange,
        update: Update,
        meter: Meter,
        loader: MicroBatchLoader,
        device: torch.device,
        statistics: RunningStatistics,
        precision: Callable[[], AbstractContextManager[object]] = nullcontext,
        flops: FlopCounter | None = None,
        seed_forward: Callable[[int], None],
    ) -> None:
        self._model = model
        self._loss = loss
        self._exchange = exchange
        self._update = update
        self._meter = meter
        self._loader = loader
        self._device = device
        self._precision = precision
        self._statistics = statistics
        self._buffers = StepBuffers(model, ignored=statistics.buffer_names())
        self._flops = flops or FlopCounter()
        self._seed_forward = seed_forward
        self._rank, self._world_size = rank_of_replica(), num_replicas()
        self._is_sharded = is_sharded(model)
        self._to_device = DeviceCopy(device)
        self._stopwatch = Stopwatch(device)
        self._is_combining = False
        self._parts: tuple[str, ...] | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that the loss returns beside what is minimised, sorted; none before the first step."""
        return self._parts or ()

    def take_busy_s(self) -> float:
        """Return the seconds spent in forward passes since the last call, in which a replica waits for nobody.

        On a GPU those of passes that have ended by now.
        """
        return self._stopwatch.take()

    def take_flops_per_sample(self) -> float | None:
        """Return the mean FLOPs per sample of this replica's passes since the last call; None where there were none."""
        return self._flops.take_per_sample()

    def step(self, record: StepRecord, *, report: RankReport) -> PendingSum:
        """Take one optimizer step on the samples at the record's position; no host sync.

        Args:
            record: position, batch and learning rate.
            report: what this replica sends to the others.

        Returns:
            What the replicas tell each other of the step, under way.
        """
        if self._statistics:
            self._statistics.begin_step()
        self._buffers.begin_step()
        (loss_sum, *part_sums), num_samples, halved = self._backward(record)
        self._exchange.combine()
        grad_norm, scaled_norm = self._update.grad_norms(self._exchange.grad_norm)
        sums, measured = self._meter.close_step(grad_norm=scaled_norm)
        pending = send(
            record,
            report=report,
            loss_sum=loss_sum,
            part_sums=part_sums,
            num_samples=num_samples,
            grad_norm=grad_norm,
            meter_sums=sums,
            measured=measured,
            halved=halved,
        )
        self._update.step(grad_norm, record)
        self._exchange.updated()
        if self._statistics:
            self._statistics.end_step(num_micro_batches=record.num_micro_batches, finite=torch.isfinite(grad_norm))
        return pending

    def _backward(self, record: StepRecord) -> tuple[list[Tensor], int, bool]:
        """Accumulate the gradient of the mean loss over the global batch.

        Where the memory does not suffice, this replica begins the step anew with each micro-batch in halves: the same
        samples, the same batch, nothing for the others to wait for but the time it takes.

        Returns:
            This replica's sums of the loss and its parts, over how many samples, and whether micro-batches had to be
            halved.

        Raises:
            OutOfMemoryError: where that does not help.
        """
        parts = 1
        while True:
            passes = self._passes(record, parts=parts)
            try:
                return *self._accumulate(passes, record), parts > 1
            except torch.OutOfMemoryError as error:
                cause = str(error).splitlines()[0]
            # Only here, past the error, is the memory that its traceback held free.
            self._check_can_begin_anew(record, parts=parts, cause=cause)
            passes.close()
            self._update.zero_grad()
            self._meter.discard_step()
            self._statistics.discard_step()
            self._buffers.discard_step()
            release_memory(self._device)
            parts *= 2

    def _accumulate(self, passes: Iterator[_Pass], record: StepRecord) -> tuple[list[Tensor], int]:
        sums: list[Tensor] = []
        num_samples = 0
        for one in passes:
            # Replicas are averaged with equal weight; this factor makes it the mean over samples, whatever their sizes.
            weight = one.num_samples * self._world_size / record.global_batch_size
            self._meter.begin(num_samples=one.num_samples, weight=weight)
            self._statistics.begin_micro_batch(one.number if one.num_samples else None)
            self._seed_forward(one.position)
            with self._deferred(is_last=one.is_last), self._as_counted(one, record):
                loss, parts = self._forward(one)
                self._is_combining = one.is_last and self._world_size > 1
                self._backpropagate(loss if weight == 1 else loss * weight)
                self._is_combining = False
            summed = [value.detach() * one.num_samples for value in (loss, *parts)]
            sums = [total + value for total, value in zip(sums, summed, strict=True)] if sums else summed
            num_samples += one.num_samples
        assert sums, "a step without a pass"
        return sums, num_samples

    def _deferred(self, *, is_last: bool) -> AbstractContextManager[None]:
        return defer_combining(self._model, is_last=is_last)

    def _backpropagate(self, loss: Tensor) -> None:
        self._update.scaled(loss).backward()  # type: ignore[no-untyped-call]

    def _forward(self, one: _Pass) -> tuple[Tensor, list[Tensor]]:
        began = self._stopwatch.start()
        with self._precision(), _unused_explained():
            loss, parts = split_training_loss(self._loss(self._model, one.batch))
        self._stopwatch.stop(began)
        names = tuple(sorted(parts))
        if self._parts is None:
            self._parts = names
        elif names != self._parts:
            # Their sums travel by place: another number of them would not meet that of the other replicas.
            raise TaskError(
                f"the loss returned the parts {', '.join(names) or 'none'} here and "
                f"{', '.join(self._parts) or 'none'} before: return the same ones for each micro-batch"
            )
        return loss, [parts[name] for name in names]

    def _as_counted(self, one: _Pass, record: StepRecord) -> AbstractContextManager[object]:
        """Count the pass; one of a size off the grid runs uncompiled, for it would be compiled to run once."""
        counting = self._flops.counting(one.batch, num_samples=one.num_samples)
        return counting if one.num_samples == record.micro_batch_size else _uncompiled(counting)

    def _passes(self, record: StepRecord, *, parts: int) -> Generator[_Pass]:
        """Yield the forward and backward passes of a step: the micro-batches, each in so many parts."""
        window = self._loader.window(
            position=record.position,
            global_batch_size=record.global_batch_size,
            micro_batch_size=record.micro_batch_size,
        )
        num_micro_steps = record.micro_steps(self._world_size)
        for number, micro in enumerate(window, start=1):
            batch = self._to_device(micro.batch)
            num_pieces = min(parts, micro.num_samples // self._statistics.smallest_micro_batch)
            pieces = [batch] if num_pieces <= 1 else split(batch, num_pieces, num_samples=micro.num_samples)
            position, left = micro.position, micro.num_samples
            for index, piece in enumerate(pieces, start=1):
                share = -(-left // (len(pieces) - index + 1))
                is_last = number == num_micro_steps and index == len(pieces)
                place = (number - 1) * self._world_size + self._rank
                yield _Pass(batch=piece, num_samples=share, number=place, position=position, is_last=is_last)
                position, left = position + share, left - share

    def _check_can_begin_anew(self, record: StepRecord, *, parts: int, cause: str) -> None:
        if self._is_sharded and self._world_size > 1:
            raise OutOfMemoryError(
                f"micro-batches of {record.micro_batch_size} did not fit into memory, and a replica with sharded "
                f"parameters cannot begin a step anew by itself: go on from the latest checkpoint with --resume "
                f"--micro_batch_size {max(1, record.micro_batch_size // 2)} ({cause})"
            )
        if self._world_size > 1 and _synchronises_forward(self._model):
            raise OutOfMemoryError(
                f"micro-batches of {record.micro_batch_size} did not fit into memory, and a replica whose "
                f"SyncBatchNorm takes part in the others' forward passes cannot begin a step anew by itself: go on "
                f"from the latest checkpoint with --resume --micro-batch-size "
                f"{max(1, record.micro_batch_size // 2)} ({cause})"
            )
        if self._is_combining:
            raise OutOfMemoryError(
                f"micro-batches of {record.micro_batch_size} did not fit into memory while the replicas combined their "
                f"gradients: go on from the latest checkpoint with --resume --micro-batch-size "
                f"{max(1, record.micro_batch_size // 2)} ({cause})"
            )
        least = self._statistics.smallest_micro_batch
        if parts >= record.micro_batch_size // least:
            samples = "a single sample" if least == 1 else f"{least} samples"
            raise OutOfMemoryError(f"the memory does not suffice for {samples} at a time ({cause})")


def _synchronises_forward(model: nn.Module) -> bool:
    return any(isinstance(module, nn.SyncBatchNorm) and module.training for module in model.modules())


@contextmanager
def _unused_explained() -> Iterator[None]:
    """Say which setting helps where a step left out parameters that were used at the start, such as a branch does."""
    try:
        yield
    except RuntimeError as error:
        if "Expected to have finished reduction in the prior iteration" not in str(error):
            raise
        raise TaskError(
            "the loss did not use all parameters in the step before, though it does in others: give "
            "--find-unused-parameters true, so that the replicas look for those in each step"
        ) from error


@contextmanager
def _uncompiled(inner: AbstractContextManager[object]) -> Iterator[None]:
    with uncompiled(), inner:
        yield


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One forward and backward pass.

    Attributes:
        batch: on the device.
        num_samples: of the step in it; 0 for a filler.
        number: of its micro-batch in the step, from 0, over all replicas.
        position: of its first sample in the stream.
        is_last: of the step, after which the replicas combine their gradients.
    """

    batch: Batch
    num_samples: int
    number: int
    position: int
    is_last: bool


def seed_forward(seed: int, position: int, *, device: torch.device, beside_torch: bool) -> None:
    """Seed the generators that the forward pass on the micro-batch that begins at `position` draws from.

    Dropout and the like depend on the position in the stream, and so not on restarts, and not on which replica runs
    the micro-batch.

    Args:
        seed: of the run.
        position: in the stream.
        device: of this replica.
        beside_torch: whether numpy's and Python's generators are drawn from, such as for the weights of a mixup.
    """
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") >> 1
    if beside_torch:
        seed_generators(number)
    else:
        # torch.manual_seed visits every kind of device there is, which costs a hundred times as much.
        torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
