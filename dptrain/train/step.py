"""One optimizer step, as the algorithm would stand in a paper; when and on what to step is the trainer's business."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.optim import Optimizer

from dptrain.data import MicroBatchLoader
from dptrain.observe import Meter, PendingSum
from dptrain.observe.stopwatch import Stopwatch
from dptrain.tasks.base import LossFunction
from dptrain.train.consensus import StepRecord, Word, send
from dptrain.train.optimizer import set_learning_rate, step_if_finite


class Stepper:
    """Holds what a step works on, and takes steps.

    Args:
        accelerator: device, precision, synchronisation.
        model: the prepared (wrapped) model.
        loss: mean loss of a micro-batch.
        optimizer: over the model's parameters.
        meter: sees the gradients.
        loader: gives this replica's micro-batches.
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
        max_grad_norm: float | None,
        seed_of: Callable[[int], int],
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._loss = loss
        self._optimizer = optimizer
        self._meter = meter
        self._loader = loader
        self._max_grad_norm = max_grad_norm
        self._seed_of = seed_of
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._stopwatch = Stopwatch(accelerator.device)

    def take_busy_s(self) -> float:
        """Return the seconds spent in forward passes since the last call, in which a replica waits for nobody.

        On a GPU those of passes that have ended by now.
        """
        return self._stopwatch.take()

    def step(self, record: StepRecord, *, word: Word) -> PendingSum:
        """Take one optimizer step on the samples at the record's position; no host sync.

        Args:
            record: position, batch and learning rate.
            word: what this replica has to tell the others.

        Returns:
            What the replicas tell each other of the step, under way.
        """
        loss_sum = self._backward(record)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        pending = send(record, word=word, loss_sum=loss_sum, meter_sums=self._meter.local_sums(grad_norm=grad_norm))
        if self._max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, grad_norm)
        set_learning_rate(self._optimizer, record.learning_rate)
        step_if_finite(self._optimizer, grad_norm)
        self._optimizer.zero_grad(set_to_none=True)
        return pending

    def _backward(self, record: StepRecord) -> Tensor:
        """Accumulate the gradient of the mean loss over the global batch; return this replica's sum of losses."""
        world_size = self._accelerator.num_processes
        loss_sum = torch.zeros((), device=self._accelerator.device)
        window = self._loader.window(
            position=record.position,
            global_batch_size=record.global_batch_size,
            micro_batch_size=record.micro_batch_size,
        )
        for number, micro in enumerate(window, start=1):
            # Replicas are averaged with equal weight; this factor makes it the mean over samples, whatever their sizes.
            weight = micro.num_samples * world_size / record.global_batch_size
            self._meter.begin(num_samples=micro.num_samples, weight=weight)
            _seed_forward(self._seed_of(micro.position), self._accelerator.device)
            last = number == record.micro_steps(world_size)
            with nullcontext() if last else self._accelerator.no_sync(self._model):
                began = self._stopwatch.start()
                loss = self._loss(self._model, send_to_device(micro.batch, self._accelerator.device, non_blocking=True))
                self._stopwatch.stop(began)
                self._accelerator.backward(loss * weight)
            loss_sum += loss.detach() * micro.num_samples
        return loss_sum


def _seed_forward(seed: int, device: torch.device) -> None:
    """Seed the generators that a forward pass draws from."""
    # torch.manual_seed visits every kind of device there is, which costs a hundred times as much.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
