"""The callback of a Trainer with the mixin: measures for it, tells it when an update is done, carries its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from transformers import TrainerState, TrainingArguments

from dptrain.integrations.adaptation import Adaptation, scale_learning_rate
from dptrain.integrations.transformers.callback import NoiseScaleMonitor
from dptrain.noise import NoiseScale


class WindowOwner(Protocol):
    """What the callback needs of the mixin."""

    adaptation: Adaptation
    micro_steps_seen: int

    def close_window(self, known: NoiseScale) -> None:
        """Decide on the next window, given what is known of the noise scale."""


class WindowCallback(NoiseScaleMonitor):
    """Measures for a Trainer with the mixin, tells it when an update is done, and carries its state.

    Args:
        trainer: the one with the mixin.
        options: settings of `NoiseScaleMonitor`.
    """

    def __init__(self, trainer: WindowOwner, **options: Any) -> None:  # noqa: ANN401 - named in the base class
        super().__init__(**options)
        self._trainer = trainer
        self._known: NoiseScale | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's signature
        """Put the meter on the parameters, and let the learning rate follow the batch."""
        super().on_train_begin(args, state, **kwargs)
        assert self.meter is not None
        optimizer = kwargs["optimizer"]
        prepared = getattr(optimizer, "optimizer", optimizer)
        adaptation = self._trainer.adaptation
        self.meter.on_remove(scale_learning_rate(prepared, lambda: adaptation.window.learning_rate_factor))

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Close the step. What is known before it decides on the next window, so that nobody waits for this one."""
        assert self.meter is not None
        self._known = self.meter.read()
        super().on_pre_optimizer_step()

    def on_step_end(self, *_: object, **__: object) -> None:
        """Hand over to the Trainer."""
        assert self._known is not None
        self._trainer.close_window(self._known)

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` and `batch/…` (synchronises the device)."""
        return {**super().as_metrics(), **self._trainer.adaptation.as_metrics()}

    def _record(self) -> dict[str, Any] | None:
        record = super()._record()
        if record is None:
            return None
        trainer = self._trainer
        adaptation = trainer.adaptation.state_dict()
        return {**record, "adaptation": adaptation, "micro_steps_seen": trainer.micro_steps_seen}

    def _restore(self, record: Mapping[str, Any]) -> None:
        super()._restore(record)
        self._trainer.adaptation.load_state_dict(record["adaptation"])
