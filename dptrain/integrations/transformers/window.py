"""A mixin that owns the Trainer's window of micro-batches, so that its length may change between any two updates.

The Trainer takes a step where the number of the batch within the epoch is a multiple of the accumulation steps, but
synchronises gradients at the end of the window that it fetched. A callback that changes the setting parts the two,
and replicas then step on gradients of their own. Here the Trainer accumulates nothing: it is given whole windows as
its batches, and both the window and its synchronisation are in one place.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import TrainingArguments

from dptrain.control import RuleName
from dptrain.control.settings import ControlConfig
from dptrain.errors import CheckpointError, ConfigError
from dptrain.integrations.batch_adapter import BatchAdapter
from dptrain.integrations.transformers.window_callback import WindowCallback
from dptrain.observe import Meter

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

_MICRO_BATCHES = "micro_batches"


class BatchAdapterMixin(_Trainer):
    """Measures, and lets the number of micro-batches per update follow.

    ```python
    class AdaptiveTrainer(BatchAdapterMixin, Trainer): ...

    trainer = AdaptiveTrainer(model, args, train_dataset=data)
    ```

    `gradient_accumulation_steps` of the arguments is the first window. With `max_steps` the run and its schedule
    are that many updates long, over as many epochs as it takes. With `num_train_epochs` the number of updates is
    not known beforehand: then the schedule, its warm-up too, is stepped once for each micro-batch, and ends with
    the data. Nothing but the length of the window is changed.

    Args:
        args: those of the Trainer.
        control: law and limits; by default those of `dptrain train`.
        rule: how the learning rate follows the batch; by default that of `dptrain train` for this optimizer.
        max_samples: length of the run, where it is known.
        noise: settings of the `NoiseScaleMonitor` that measures. Each step is measured where `every` is not
            among them: an interval that rests on timings would make two runs take different decisions.
        kwargs: those of the Trainer.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401 - those of the Trainer
        control: ControlConfig | None = None,
        rule: RuleName | None = None,
        max_samples: int | None = None,
        noise: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ANN401 - those of the Trainer
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.restore_callback_states_from_checkpoint:
            raise ConfigError("restore_callback_states_from_checkpoint would replace the meter: set it to False")
        measured = (noise or {}).get("micro_batch_size")
        if measured not in (None, self.args.train_batch_size):
            raise ConfigError(
                f"noise gives micro_batch_size={measured}, but the batch is counted in samples of the data set, "
                f"{self.args.train_batch_size} in a micro-batch: leave it out, or give that number"
            )
        self._settings: dict[str, Any] = {"control": control, "rule": rule, "max_samples": max_samples}
        self._first_window = self.args.gradient_accumulation_steps
        self.args = copy.copy(self.args)
        self.args.gradient_accumulation_steps = 1
        self._own_schedule = self.lr_scheduler is not None
        self._callback = WindowCallback(self, **{"every": 1, **(noise or {})})
        self._callback.add_to(self)
        self.micro_steps_seen = 0
        self._micro_steps_in_epoch: int | None = None
        self._micro_steps_in_all: int | None = None
        self.adapter: BatchAdapter | None = None

    def make_adapter(self, meter: Meter, optimizer: Optimizer) -> BatchAdapter:
        """Return what decides on the windows of a run that begins, with the first window of the arguments."""
        self.adapter = BatchAdapter(
            meter,
            optimizer,
            micro_batch_size=self.args.train_batch_size,
            accumulation_steps=self._first_window,
            **self._settings,
        )
        return self.adapter

    @property
    def _window(self) -> int:
        return self._first_window if self.adapter is None else self.adapter.accumulation_steps

    # What the Trainer calls

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple[Any, ...]:  # noqa: ANN401 - the Trainer's signature
        """Plan the run in micro-batches; with `max_steps` the epochs are without end, since windows may grow."""
        epochs, *others, micro_steps_in_epoch, max_steps = super().set_initial_training_values(args, dataloader)
        self._micro_steps_in_epoch = micro_steps_in_epoch
        self._micro_steps_in_all = None if args.max_steps > 0 else max_steps
        self.micro_steps_seen = 0
        return (sys.maxsize if args.max_steps > 0 else epochs, *others, micro_steps_in_epoch, max_steps)

    def _init_training_state(
        self,
        max_steps: int,
        updates_per_epoch: int,
        epochs: int,
        checkpoint: str | None,
        trial: Any,  # noqa: ANN401 - the Trainer's signature
    ) -> tuple[int, int]:
        """Find the position of a resumed run from the micro-batches seen: updates had different numbers of them."""
        super()._init_training_state(max_steps, updates_per_epoch, epochs, checkpoint, trial)
        if checkpoint is None:
            return 0, 0
        states: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]  # as loaded
        saved = states.get(WindowCallback.__name__)
        if saved is None:
            raise CheckpointError(f"{checkpoint} was not written with an adaptive batch: resume it without the mixin")
        record = saved["attributes"]["record"]
        # Counted per replica: on another number of them as many samples are other micro-steps.
        samples_seen = record["micro_steps_seen"] * record["adapter"]["quantum"]
        self.micro_steps_seen = samples_seen // (self.args.train_batch_size * self.args.world_size)
        epoch, done = divmod(self.micro_steps_seen, updates_per_epoch)
        return epoch, 0 if self.args.ignore_data_skip else done

    def get_batch_samples(
        self,
        epoch_iterator: Iterator[Any],
        num_batches: int,  # noqa: ARG002 - the Trainer's signature
        device: torch.device,
    ) -> tuple[list[Any], Any]:
        """Return one batch: the window, with the items of all its micro-batches counted."""
        size = self._window
        if self._micro_steps_in_all is not None:
            size = min(size, self._micro_steps_in_all - self.micro_steps_seen)
        micro_batches, num_items = super().get_batch_samples(epoch_iterator, size, device)
        return ([{_MICRO_BATCHES: micro_batches}] if micro_batches else []), num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:  # noqa: ANN401 - the Trainer's signature
        """Run a window; gradients are synchronised with its last micro-batch."""
        micro_batches = inputs[_MICRO_BATCHES]
        self.current_gradient_accumulation_steps = len(micro_batches)
        losses = []
        for number, micro_batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(model=model):
                losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        self.micro_steps_seen += len(micro_batches)
        if self._micro_steps_in_all is not None:
            # The Trainer ends, saves and evaluates at this number: exact from the last window on.
            left = self._micro_steps_in_all - self.micro_steps_seen
            windows = math.ceil(left / self._window)
            self.state.max_steps = self.state.global_step + 1 + windows
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the operations of a whole window."""
        return sum(super(BatchAdapterMixin, self).floating_point_ops(batch) for batch in inputs[_MICRO_BATCHES])

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        for micro_batch in inputs[_MICRO_BATCHES]:
            super()._track_num_input_tokens(micro_batch)  # type: ignore[no-untyped-call]

    # After an update

    def close_window(self) -> None:
        """Decide on the next window, and bring epoch and schedule up to the position reached."""
        assert self.adapter is not None
        micro_steps = self.current_gradient_accumulation_steps
        self.adapter.decide(micro_steps=micro_steps, has_stepped=True)
        if self._micro_steps_in_epoch:
            self.state.epoch = self.micro_steps_seen / self._micro_steps_in_epoch
        schedule = self.lr_scheduler
        if self._own_schedule or self._micro_steps_in_all is None or self.accelerator.optimizer_step_was_skipped:
            return
        if isinstance(schedule, LRScheduler) and not isinstance(schedule, ReduceLROnPlateau):
            for _ in range(micro_steps - 1):  # the Trainer has stepped it once
                schedule.step()
