"""The meter as a callback of Lightning's Trainer; what changes the batch stands in `batch_size`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.data import extract_batch_size
from torch.optim import Optimizer

from dptrain.errors import ObservationError
from dptrain.noise import Smoothing
from dptrain.observe import Meter, ParameterHook, Reading
from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck
from dptrain.observe.measurement_interval import MeasurementInterval


class NoiseScaleMonitor(Callback):
    """Measures the gradient noise scale and logs it as `noise_scale/…` every `log_every_n_steps`.

    The loss that `training_step` returns is taken to be the mean over its batch.

    Args:
        every: measure each such step; by default the meter chooses by what measuring costs.
        budget: the share of the step time that measuring may take, where `every` is not given.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set where it is small and drawn without replacement.

    Raises:
        ObservationError: when training begins, where the meter could not be right.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        budget: float = 0.01,
        smoothing: Smoothing | None = None,
        level: float = 0.95,
        population: int | None = None,
    ) -> None:
        self._every, self._budget = every, budget
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
        self.meter = Meter(
            parameters,
            hook=ParameterHook(parameters),
            loss_scale=lambda: self._scale,
            interval_rule=MeasurementInterval(every=self._every, budget=self._budget),
            guard=DuplicateDataCheck(None),
            **self._options,
        )
        if self._saved is not None:
            self._restore(self._saved)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002 - Lightning's signature
        """Announce a micro-batch."""
        assert self.meter is not None
        if self.meter.measuring:
            self.meter.begin_forward(num_samples=extract_batch_size(batch))
        self._micro_steps += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Close the step; Lightning clips after this."""
        assert self.meter is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        amplified = 1.0 if scaler is None else float(scaler.get_scale())
        # The loss was divided by the planned accumulation steps; the last window of an epoch may have fewer.
        self._scale = amplified * self._micro_steps / trainer.accumulate_grad_batches
        grad_norm = None
        if self.meter.measuring:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
            if not getattr(optimizer, "_step_supports_amp_scaling", False):
                grad_norm = (
                    grad_norm * amplified
                )  # the gradients were unscaled by now, those that the hook saw were not
        self.meter.step(grad_norm=grad_norm)
        self._micro_steps = 0
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set where mypy does not look
        if every and (trainer.global_step + 1) % every == 0:
            pl_module.log_dict(self.as_metrics(), on_step=True, on_epoch=False)

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` (synchronises the device)."""
        assert self.meter is not None
        return Reading(self.meter).as_metrics()

    def on_fit_end(self, *_: object) -> None:
        """Take everything off the model; the meter can still be read."""
        self._remove()

    def on_exception(self, *_: object) -> None:
        """Do as at the end, but wait for nobody."""
        self._remove(wait=False)

    def _remove(self, *, wait: bool = True) -> None:
        if self.meter is not None:
            self.meter.remove(wait=wait)

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


def _refuse(trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise where the hooks would not see what a replica's own gradient is."""
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
