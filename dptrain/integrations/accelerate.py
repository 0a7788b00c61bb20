"""The meter and the adaptive batch in a loop on accelerate: two objects whose `step` goes before the clipping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from dptrain.control import Controller, Limits, RuleName
from dptrain.errors import ObservationError
from dptrain.integrations.adaptation import Adaptation, scale_learning_rate
from dptrain.noise import Smoothing
from dptrain.observe import Reading, attach


class NoiseScaleMonitor:
    """Measures the gradient noise scale in a loop on accelerate.

    ```python
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    monitor = NoiseScaleMonitor(accelerator, model)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))  # the mean over the micro-batch
            monitor.step()                               # before clip_grad_norm_ and optimizer.step()
            ...
    accelerator.log(monitor.as_metrics())
    ```

    It is saved and loaded with `accelerator.save_state` and `load_state`.

    Args:
        accelerator: the one that prepared the model.
        model: as `accelerator.prepare` returned it.
        micro_batch_size: see `dptrain.attach`.
        every: measure each such step; by default the meter chooses by what measuring costs.
        budget: the share of the step time that measuring may take, where `every` is not given.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set where it is small and drawn without replacement.

    Raises:
        ObservationError: where the meter could not be right.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        micro_batch_size: int | None = None,
        every: int | None = None,
        budget: float = 0.01,
        smoothing: Smoothing | None = None,
        level: float = 0.95,
        population: int | None = None,
    ) -> None:
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ObservationError(
                f"{accelerator.distributed_type.value} reduces gradients in an engine of its own, where no "
                "replica's gradient can be seen: measure under DDP or in one process"
            )
        self._accelerator = accelerator
        self._micro_steps = 0
        self.meter = attach(
            model,
            micro_batch_size=micro_batch_size,
            loss_scale=self._loss_scale,
            every=every,
            budget=budget,
            smoothing=smoothing,
            level=level,
            population=population,
        )
        accelerator.register_for_checkpointing(self)

    def _loss_scale(self) -> float:
        scaler = self._accelerator.scaler
        amplified = 1.0 if scaler is None else float(scaler.get_scale())
        # `backward` divides by the planned accumulation steps; the last window of an epoch may have fewer.
        planned: int = self._accelerator.gradient_accumulation_steps
        return amplified * self._micro_steps / planned

    def step(self) -> Reading | None:
        """Call it after each `accelerator.backward`, before clipping; does nothing while gradients accumulate.

        Returns:
            The reading, where the gradients were synchronised.
        """
        self._micro_steps += 1
        if not self._accelerator.sync_gradients:
            return None
        reading = self.meter.step()
        self._micro_steps = 0
        return reading

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` for `accelerator.log` (synchronises the device)."""
        return Reading(self.meter).as_metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return what `accelerator.save_state` saves."""
        return {"meter": self.meter.state_dict()}

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.meter.load_state_dict(record["meter"])

    def remove(self) -> None:
        """Take everything off the model."""
        self.meter.remove()


class BatchAdapter(NoiseScaleMonitor):
    """Measures, and lets the number of accumulation steps follow: `accelerator.accumulate` does the rest.

    The window changes only while gradients are synchronised, and accelerate's counter starts anew with it, so
    that no window is cut. A decision rests on all steps but the one under way, so that nobody waits for it. The
    number of scheduler steps is left alone: accelerate counts updates, and a run whose batch grows has fewer of
    them, so write schedules in samples (`progress/samples`).

    Args:
        accelerator: the one that prepared the model, with the first window in `gradient_accumulation_steps`.
        model: as `accelerator.prepare` returned it.
        optimizer: the one whose learning rate follows `rule`.
        law: decides on the global batch, such as `NoiseLaw()`.
        limits: what the batch may do.
        micro_batch_size: samples in one forward–backward on one replica.
        rule: how the learning rate follows the batch; a factor on the rates that the groups hold.
        options: further settings of `NoiseScaleMonitor`. Each step is measured where `every` is not among them: an
            interval that rests on timings would make two runs take different decisions.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        law: Controller,
        limits: Limits,
        micro_batch_size: int,
        rule: RuleName = "none",
        **options: Any,  # noqa: ANN401 - those of the monitor, which names their types
    ) -> None:
        self.adaptation = Adaptation(
            law=law,
            limits=limits,
            micro_batch_size=micro_batch_size,
            world_size=accelerator.num_processes,
            accumulation_steps=accelerator.gradient_accumulation_steps,
            rule=rule,
        )
        super().__init__(accelerator, model, micro_batch_size=micro_batch_size, **{"every": 1, **options})
        self._factor = 1.0
        # The window is decided on before the step that it follows, whose factor is the one before.
        prepared = getattr(optimizer, "optimizer", optimizer)
        self.meter.on_remove(scale_learning_rate(prepared, lambda: self._factor))

    def step(self) -> Reading | None:
        """Call it after each `accelerator.backward`, before clipping; where gradients were synchronised, decides."""
        if not self._accelerator.sync_gradients:
            return super().step()
        self._factor = self.adaptation.window.learning_rate_factor
        known, micro_steps = self.meter.read(), self._micro_steps + 1
        reading = super().step()
        self.adaptation.decide(known, micro_steps=micro_steps)
        self._apply()
        return reading

    def _apply(self) -> None:
        accumulation_steps = self.adaptation.window.accumulation_steps
        if accumulation_steps != self._accelerator.gradient_accumulation_steps:
            self._accelerator.gradient_accumulation_steps = accumulation_steps
            self._accelerator.step = 0

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` and `batch/…` for `accelerator.log` (synchronises the device)."""
        return {**super().as_metrics(), **self.adaptation.as_metrics()}

    def state_dict(self) -> dict[str, Any]:
        """Return what `accelerator.save_state` saves."""
        return {**super().state_dict(), "adaptation": self.adaptation.state_dict()}

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        super().load_state_dict(record)
        self.adaptation.load_state_dict(record["adaptation"])
        self._apply()
