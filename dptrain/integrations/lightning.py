"""The meter and the adaptive batch as callbacks of Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.data import extract_batch_size
from torch.optim import Optimizer

from dptrain.control import Controller, Limits, RuleName
from dptrain.errors import ConfigError, ObservationError
from dptrain.integrations.adaptation import Adaptation, scale_learning_rate
from dptrain.noise import NoiseScale, Smoothing
from dptrain.observe import Meter, ParameterTap, Reading


class GradientNoiseScaleMonitor(Callback):
    """Measures the gradient noise scale and logs it as `gns/…` every `log_every_n_steps`.

    The loss that `training_step` returns is taken to be the mean over its batch.

    Args:
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set where it is small and drawn without replacement.

    Raises:
        ObservationError: when training begins, where the meter could not be right.
    """

    def __init__(
        self, *, smoothing: Smoothing | None = None, level: float = 0.95, population: int | None = None
    ) -> None:
        self._options: dict[str, Any] = {"smoothing": smoothing, "level": level, "population": population}
        self._saved: dict[str, Any] | None = None
        self._micro_steps = 0
        self._scale = 1.0
        self.meter: Meter | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the meter on the parameters, now that the strategy has wrapped them."""
        _refuse(trainer, pl_module)
        self._remove()
        parameters = list(pl_module.parameters())
        self.meter = Meter(parameters, tap=ParameterTap(parameters), loss_scale=lambda: self._scale, **self._options)
        if self._saved is not None:
            self._restore(self._saved)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002 - Lightning's signature
        """Announce a micro-batch."""
        assert self.meter is not None
        self.meter.begin(num_samples=extract_batch_size(batch))
        self._micro_steps += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Close the step; Lightning clips after this."""
        assert self.meter is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        amplified = 1.0 if scaler is None else float(scaler.get_scale())
        # The loss was divided by the planned accumulation steps; the last window of an epoch may have fewer.
        self._scale = amplified * self._micro_steps / trainer.accumulate_grad_batches
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            grad_norm = grad_norm * amplified  # the gradients were unscaled by now, those that the tap saw were not
        self.meter.step(grad_norm=grad_norm)
        self._micro_steps = 0
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set where mypy does not look
        if every and (trainer.global_step + 1) % every == 0:
            pl_module.log_dict(self.as_metrics(), on_step=True, on_epoch=False)

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `gns/…` (synchronises the device)."""
        assert self.meter is not None
        return Reading(self.meter).as_metrics()

    def on_fit_end(self, *_: object) -> None:
        """Take everything off the model; the meter can still be read."""
        self._remove()

    def on_exception(self, *_: object) -> None:
        """Do as at the end."""
        self._remove()

    def _remove(self) -> None:
        if self.meter is not None:
            self.meter.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {} if self.meter is None else {"meter": self.meter.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict` when training begins."""
        self._saved = state_dict or None

    def _restore(self, record: dict[str, Any]) -> None:
        assert self.meter is not None
        self.meter.load_state_dict(record["meter"])
        self._saved = None


class AdaptiveBatchSize(GradientNoiseScaleMonitor):
    """Measures, and lets `trainer.accumulate_grad_batches` follow.

    Lightning steps where the number of the batch within the epoch is a multiple of the accumulation steps, so a
    new number comes into force where it divides the batches done: elsewhere one window would be cut. Schedulers
    are stepped as ever, once per update, of which a run whose batch grows has fewer.

    Args:
        micro_batch_size: samples in one batch of one replica's data loader.
        law: decides on the global batch, such as `NoiseLaw()`.
        limits: what the batch may do.
        rule: how the learning rate follows the batch; a factor on the rates that the groups hold.
        options: further settings of `GradientNoiseScaleMonitor`.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int,
        law: Controller,
        limits: Limits,
        rule: RuleName = "none",
        **options: Any,  # noqa: ANN401 - those of the monitor, which names their types
    ) -> None:
        super().__init__(**options)
        self._settings: dict[str, Any] = {
            "micro_batch_size": micro_batch_size,
            "law": law,
            "limits": limits,
            "rule": rule,
        }
        self._closed: tuple[NoiseScale, int] | None = None
        self.adaptation: Adaptation | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first window from the trainer, or from the checkpoint."""
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]  # the same
            raise ConfigError("GradientAccumulationScheduler sets the accumulation steps too: remove one of the two")
        self.adaptation = Adaptation(
            world_size=trainer.world_size, accumulation_steps=trainer.accumulate_grad_batches, **self._settings
        )
        super().on_fit_start(trainer, pl_module)
        trainer.accumulate_grad_batches = self.adaptation.window.accumulation_steps

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        """Let the learning rate follow the batch, now that there is an optimizer."""
        assert self.meter is not None
        self.meter.on_remove(scale_learning_rate(trainer.optimizers[0], self._factor))

    def _factor(self) -> float:
        assert self.adaptation is not None
        return self.adaptation.window.learning_rate_factor

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Close the step. What is known before it decides on the next window, so that nobody waits for this one."""
        assert self.meter is not None
        self._closed = self.meter.read(), self._micro_steps
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        """Decide on the next window, where an update was made."""
        assert self.adaptation is not None
        if self._closed is None:
            return
        (known, micro_steps), self._closed = self._closed, None
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        window = self.adaptation.decide(
            known,
            micro_steps=micro_steps,
            may_be=lambda steps: trainer.is_last_batch or done % steps == 0,
        )
        trainer.accumulate_grad_batches = window.accumulation_steps

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `gns/…` and `batch/…` (synchronises the device)."""
        assert self.adaptation is not None
        return {**super().as_metrics(), **self.adaptation.as_metrics()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        record = super().state_dict()
        return {**record, "adaptation": self.adaptation.state_dict()} if record and self.adaptation else record

    def _restore(self, record: dict[str, Any]) -> None:
        assert self.adaptation is not None
        super()._restore(record)
        self.adaptation.load_state_dict(record["adaptation"])


def _refuse(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise where the taps would not see what a replica's own gradient is."""
    if not pl_module.automatic_optimization:
        raise ObservationError(
            "with manual optimization Lightning does not know which backward passes belong to a step: measure "
            "with dptrain.attach in your training_step"
        )
    # By exact type: DeepSpeed's and XLA's strategies derive from these two, and reduce gradients in their own way.
    if type(trainer.strategy) not in (DDPStrategy, SingleDeviceStrategy):
        raise ObservationError(
            f"{type(trainer.strategy).__name__} shards or reduces gradients where no replica's own gradient can be "
            "seen by this callback: use strategy='ddp' or a single device"
        )
