"""One optimizer step, as the algorithm would stand in a paper; when and on what to step is the trainer's business."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from dptrain.cost.flops import FlopCounter
from dptrain.data import MicroBatchLoader
from dptrain.errors import OutOfMemoryError
from dptrain.exchange.running_statistics import RunningStatistics
from dptrain.observe import Meter, PendingSum
from dptrain.observe.stopwatch import Stopwatch
from dptrain.runtime.step_reduction import RankReport, StepRecord, send
from dptrain.tasks.base import Batch, LossFunction, split_loss
from dptrain.train.memory import release_memory, split
from dptrain.train.optimizer import set_rate, step_if_finite


class Stepper:
    """Holds what a step works on, and takes steps.

    Args:
        accelerator: device, precision, synchronisation.
        model: the prepared (wrapped) model.
        loss: mean loss of a micro-batch.
        optimizer: over the model's parameters.
        meter: sees the gradients.
        loader: gives this replica's micro-batches.
        statistics: of the model's batch norms.
        max_grad_norm: clip the combined gradient to this norm, or None.
        seed_of: position in the stream → seed of the forward pass that begins there.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        loss: LossFunction,
        optimizer: Optimizer,
        meter: Meter,
        loader: MicroBatchLoader,
        statistics: RunningStatistics,
        max_grad_norm: float | None,
        seed_of: Callable[[int], int],
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._loss = loss
        self._optimizer = optimizer
        self._meter = meter
        self._loader = loader
        self._statistics = statistics
        self._max_grad_norm = max_grad_norm
        self._seed_of = seed_of
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._stopwatch = Stopwatch(accelerator.device)
        self._flops = FlopCounter()
        self._is_combining = False

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
            report: what this replica has to tell the others.

        Returns:
            What the replicas tell each other of the step, under way.
        """
        self._statistics.begin_step()
        loss_sum, halved = self._backward(record)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        sums = self._meter.local_sums(grad_norm=grad_norm)
        pending = send(record, report=report, loss_sum=loss_sum, meter_sums=sums, halved=halved)
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, grad_norm)
        set_rate(self._optimizer, record.learning_rate, betas=record.betas, weight_decay=record.weight_decay)
        step_if_finite(self._optimizer, grad_norm)
        self._optimizer.zero_grad(set_to_none=True)
        self._statistics.end_step(num_micro_batches=record.num_micro_batches, finite=torch.isfinite(grad_norm))
        return pending

    def _backward(self, record: StepRecord) -> tuple[Tensor, bool]:
        """Accumulate the gradient of the mean loss over the global batch.

        Where the memory does not suffice, this replica begins the step anew with each micro-batch in halves: the same
        samples, the same batch, nothing for the others to wait for but the time it takes.

        Returns:
            This replica's sum of losses, and whether micro-batches had to be halved.

        Raises:
            OutOfMemoryError: where that does not help.
        """
        parts = 1
        while True:
            passes = self._passes(record, parts=parts)
            try:
                return self._accumulate(passes, record), parts > 1
            except torch.OutOfMemoryError as error:
                told = str(error).splitlines()[0]
            # Only here, past the error, is the memory that its traceback held free.
            self._check_can_begin_anew(record, parts=parts, told=told)
            passes.close()
            self._optimizer.zero_grad(set_to_none=True)
            self._meter.discard_step()
            self._statistics.discard_step()
            release_memory(self._accelerator.device)
            parts *= 2

    def _accumulate(self, passes: Iterator[_Pass], record: StepRecord) -> Tensor:
        world_size = self._accelerator.num_processes
        loss_sum = torch.zeros((), device=self._accelerator.device)
        for one in passes:
            # Replicas are averaged with equal weight; this factor makes it the mean over samples, whatever their sizes.
            weight = one.num_samples * world_size / record.global_batch_size
            self._meter.begin(num_samples=one.num_samples, weight=weight)
            self._statistics.begin_micro_batch(one.number if one.num_samples else None)
            _seed_forward(self._seed_of(one.position), self._accelerator.device)
            together = nullcontext() if one.is_last else self._accelerator.no_sync(self._model)
            with together, self._flops.counting(one.batch, num_samples=one.num_samples):
                began = self._stopwatch.start()
                loss, _ = split_loss(self._loss(self._model, one.batch))
                self._stopwatch.stop(began)
                self._is_combining = one.is_last and world_size > 1
                self._accelerator.backward(loss * weight)
                self._is_combining = False
            loss_sum += loss.detach() * one.num_samples
        return loss_sum

    def _passes(self, record: StepRecord, *, parts: int) -> Generator[_Pass]:
        """Yield the forward and backward passes of a step: the micro-batches, each in so many parts."""
        window = self._loader.window(
            position=record.position,
            global_batch_size=record.global_batch_size,
            micro_batch_size=record.micro_batch_size,
        )
        least = self._statistics.smallest_micro_batch
        for number, micro in enumerate(window, start=1):
            batch = send_to_device(micro.batch, self._accelerator.device, non_blocking=True)
            num_pieces = min(parts, micro.num_samples // least)
            pieces = [batch] if num_pieces <= 1 else split(batch, num_pieces)
            is_last = number == record.micro_steps(self._accelerator.num_processes)
            position, left = micro.position, micro.num_samples
            for index, piece in enumerate(pieces, start=1):
                share = -(-left // (len(pieces) - index + 1))
                yield _Pass(
                    batch=piece,
                    num_samples=share,
                    number=(number - 1) * self._accelerator.num_processes + self._accelerator.process_index,
                    position=position,
                    is_last=is_last and index == len(pieces),
                )
                position, left = position + share, left - share

    def _check_can_begin_anew(self, record: StepRecord, *, parts: int, told: str) -> None:
        if self._is_combining:
            raise OutOfMemoryError(
                f"micro-batches of {record.micro_batch_size} did not fit into memory while the replicas combined their "
                f"gradients: go on from the latest checkpoint with --resume --micro-batch-size "
                f"{max(1, record.micro_batch_size // 2)} ({told})"
            )
        least = self._statistics.smallest_micro_batch
        if parts >= record.micro_batch_size // least:
            samples = "a single sample" if least == 1 else f"{least} samples"
            raise OutOfMemoryError(f"the memory does not suffice for {samples} at a time ({told})")


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


def _seed_forward(seed: int, device: torch.device) -> None:
    """Seed the generators that a forward pass draws from."""
    # torch.manual_seed visits every kind of device there is, which costs a hundred times as much.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def forward_seed(seed: int, position: int) -> int:
    """Return the seed of the forward pass on the micro-batch that begins at `position`.

    Dropout and the like depend on the position in the stream, and so not on restarts, and not on which replica runs
    the micro-batch.
    """
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
