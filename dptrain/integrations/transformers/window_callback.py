"""The callback of a Trainer with the mixin: measures, reports finished updates, and keeps its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer
from transformers import TrainerState, TrainingArguments

from dptrain.errors import ObservationError
from dptrain.integrations.batch_adapter import BatchAdapter
from dptrain.integrations.transformers.callback import NoiseScaleMonitor
from dptrain.observe import Meter


class WindowOwner(Protocol):
    """What the callback needs of the mixin."""

    adapter: BatchAdapter | None
    micro_steps_seen: int

    def make_adapter(self, meter: Meter, optimizer: Optimizer) -> BatchAdapter:
        """Return what decides on the windows of a run that begins."""

    def close_window(self) -> None:
        """Decide on the next window."""


class WindowCallback(NoiseScaleMonitor):
    """Measures for a Trainer with the mixin, reports finished updates to it, and keeps its state.

    Args:
        trainer: the one with the mixin.
        options: settings of `NoiseScaleMonitor`.
    """

    def __init__(self, trainer: WindowOwner, **options: Any) -> None:  # noqa: ANN401 - named in the base class
        super().__init__(**options)
        self._trainer = trainer
        self._saved: Mapping[str, Any] | None = None
        self._loaded = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's signature
        """Put the meter on the parameters, and let the learning rate follow the batch."""
        self._saved = None
        self._loaded = args.train_batch_size
        super().on_train_begin(args, state, **kwargs)
        assert self.meter is not None
        optimizer = kwargs["optimizer"]
        adapter = self._trainer.make_adapter(self.meter, getattr(optimizer, "optimizer", optimizer))
        if self._saved is not None:
            adapter.load_state_dict(self._saved)

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Close the step. What is known before it decides on the next window, so that nobody waits for this one."""
        assert self.meter is not None
        assert self._trainer.adapter is not None
        self._trainer.adapter.note(self.meter.read())
        super().on_pre_optimizer_step()

    def _num_samples(self, inputs: Mapping[str, Any]) -> float:
        num_samples = super()._num_samples(inputs)
        if num_samples > self._loaded:
            raise ObservationError(
                f"a micro-batch has {num_samples} sequences, packed into {self._loaded} samples of the data set, in "
                f"which the batch is counted: give noise={{'micro_batch_size': {self._loaded}}}, so that the noise "
                "scale is counted in them too"
            )
        return num_samples

    def _planned_micro_steps(self) -> int:
        assert self._trainer.adapter is not None
        return self._trainer.adapter.accumulation_steps

    def on_step_end(self, *_: object, **__: object) -> None:
        """Hand over to the Trainer."""
        self._trainer.close_window()

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` and `batch/…` (synchronises the device)."""
        adapter = self._trainer.adapter
        return {**super().as_metrics(), **({} if adapter is None else adapter.as_metrics())}

    def _record(self) -> dict[str, Any] | None:
        record, trainer = super()._record(), self._trainer
        if record is None or trainer.adapter is None:
            return None
        return {**record, "adapter": trainer.adapter.state_dict(), "micro_steps_seen": trainer.micro_steps_seen}

    def _restore(self, record: Mapping[str, Any]) -> None:
        super()._restore(record)
        self._saved = record["adapter"]
