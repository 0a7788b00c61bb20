"""The meter and the adaptive batch in a loop on accelerate: two objects whose `step` goes before the clipping."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from dptrain.control import RuleName
from dptrain.control.settings import ControlConfig
from dptrain.errors import ObservationError
from dptrain.integrations import batch_adapter as adapter
from dptrain.integrations.sample_schedule import SampleSchedule
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

    With `checkpointed=True` it is saved and loaded with `accelerator.save_state` and `load_state`. Accelerate loads
    only checkpoints with as many registered objects as there are, so leave it False where older ones must load.

    Args:
        accelerator: the one that prepared the model.
        model: as `accelerator.prepare` returned it.
        checkpointed: whether accelerate's checkpoints hold what was measured.
        options: those of `dptrain.attach`, but for `loss_scale`, which accelerate knows.

    Raises:
        ObservationError: where the meter could not be right.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        *,
        checkpointed: bool = False,
        **options: Any,  # noqa: ANN401 - those of attach, which names their types
    ) -> None:
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ObservationError(
                f"{accelerator.distributed_type.value} reduces gradients in an engine of its own, where no "
                "replica's gradient can be seen: measure under DDP or in one process"
            )
        self._accelerator = accelerator
        self._micro_steps = 0
        self._called_between = False
        self._accelerator_step = accelerator.step
        self.meter = attach(model, loss_scale=self._loss_scale, **options)
        if checkpointed:
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

        Raises:
            ObservationError: where it is called only after the last micro-batch of a window.
        """
        self._micro_steps += 1
        if not self._accelerator.sync_gradients:
            self._called_between = True
            return None
        self._refuse_last_only()
        reading = self.meter.step()
        self._micro_steps = 0
        return reading

    def _refuse_last_only(self) -> None:
        """Raise where the window that ends had other micro-batches, and no call followed any of them.

        Accelerate counts micro-batches in `step`, and starts anew at the end of the data. One whose backward pass the
        loop leaves out (a loss that is not finite) has no call either, and is no reason.
        """
        step, began = self._accelerator.step, self._accelerator_step
        self._accelerator_step = step
        at_end = step == 0 and self._accelerator.gradient_state.end_of_dataloader
        several = step > began + 1 or (at_end and self.meter.num_passes > 1)
        if self._called_between or self._accelerator.gradient_accumulation_steps == 1 or not several:
            return
        raise ObservationError(
            "step() was called once for several micro-batches, so that nobody knows how many the step has: call it "
            "after each accelerator.backward(), outside of `if accelerator.sync_gradients`"
        )

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` for `accelerator.log` (synchronises the device)."""
        return Reading(self.meter).as_metrics()

    def state_dict(self) -> dict[str, Any]:
        """Return what `accelerator.save_state` saves."""
        return {"meter": self.meter.state_dict()}

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; one that has no meter's state, such as another object's, leaves it fresh."""
        if "meter" in record:
            self.meter.load_state_dict(record["meter"])
        else:
            warnings.warn("the checkpoint has no noise scale: the meter begins anew", stacklevel=1)

    def remove(self) -> None:
        """Take everything off the model, and itself out of accelerate's checkpoints."""
        self.meter.remove()
        registered = self._accelerator._custom_objects  # noqa: SLF001 - accelerate cannot take an object back otherwise
        registered[:] = [one for one in registered if one is not self]


class BatchAdapter(NoiseScaleMonitor):
    """Measures, and lets the number of accumulation steps follow: `accelerator.accumulate` does the rest.

    The window changes only while gradients are synchronised, and accelerate's counter starts anew with it, so
    that no window is cut. Law, limits and step timing are those of `dptrain.BatchAdapter`. Schedulers that accelerate
    prepared are advanced by samples, so they end where they would without adapting.

    Args:
        accelerator: the one that prepared the model, with the first window in `gradient_accumulation_steps`.
        model: as `accelerator.prepare` returned it.
        optimizer: whose learning rate follows the batch; a factor on the rates that its groups hold.
        micro_batch_size: samples in one forward–backward on one replica.
        control: law and limits; by default those of `dptrain train`.
        rule: how the learning rate follows the batch; by default that of `dptrain train` for this optimizer.
        max_samples: length of the run, where it is known.
        options: further settings of `NoiseScaleMonitor`, which is checkpointed by default. Each step is measured where
            `every` is not among them: an interval that rests on timings would make two runs take different decisions.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        micro_batch_size: int,
        control: ControlConfig | None = None,
        rule: RuleName | None = None,
        max_samples: int | None = None,
        **options: Any,  # noqa: ANN401 - those of the monitor, which names their types
    ) -> None:
        settings = {"every": 1, "checkpointed": True, **options}
        super().__init__(accelerator, model, micro_batch_size=micro_batch_size, **settings)
        self.adapter = adapter.BatchAdapter(
            self.meter,
            getattr(optimizer, "optimizer", optimizer),  # the one inside, whose step is the real one
            micro_batch_size=micro_batch_size,
            accumulation_steps=accelerator.gradient_accumulation_steps,
            control=control,
            rule=rule,
            max_samples=max_samples,
        )
        self._schedule = SampleSchedule(reference_batch_size=self.adapter.global_batch_size)
        self._plan_schedule(self.adapter.global_batch_size / self._schedule_calls)
        self.meter.on_remove(self._schedule.release)

    def step(self) -> Reading | None:
        """Call it after each `accelerator.backward`, before clipping; where gradients were synchronised, decides."""
        if not self._accelerator.sync_gradients:
            return super().step()
        self._refuse_last_only()
        micro_steps = self._micro_steps + 1
        self._schedule.follow(self._accelerator._schedulers)  # noqa: SLF001 - those that it prepared
        self._schedule.note(self.adapter.samples_per_micro_step * micro_steps)
        self.adapter.note(self.meter.read())
        reading = super().step()
        self.adapter.decide(micro_steps=micro_steps)
        self._apply()
        return reading

    @property
    def _schedule_calls(self) -> int:
        """How often accelerate steps a schedule with each update: it counts an update as one for each process."""
        one = self._accelerator
        return 1 if one.split_batches or not one.step_scheduler_with_optimizer else one.num_processes

    def _plan_schedule(self, samples_per_schedule_step: float) -> None:
        """Have schedules advance with the samples as they did where the run began, however many processes there are."""
        self._samples_per_schedule_step = samples_per_schedule_step
        self._schedule.plan_for(samples_per_schedule_step * self._schedule_calls)

    def _apply(self) -> None:
        accumulation_steps = self.adapter.accumulation_steps
        if accumulation_steps != self._accelerator.gradient_accumulation_steps:
            self._accelerator.gradient_accumulation_steps = accumulation_steps
            self._accelerator.step = 0

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` and `batch/…` for `accelerator.log` (synchronises the device)."""
        return {**super().as_metrics(), **self.adapter.as_metrics()}

    def state_dict(self) -> dict[str, Any]:
        """Return what `accelerator.save_state` saves."""
        return {
            **super().state_dict(),
            "adapter": self.adapter.state_dict(),
            "schedule": self._schedule.state(),
            "samples_per_schedule_step": self._samples_per_schedule_step,
        }

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        super().load_state_dict(record)
        if "adapter" in record:
            self.adapter.load_state_dict(record["adapter"])
            self._schedule.restore(record.get("schedule", ()))
            if "samples_per_schedule_step" in record:
                self._plan_schedule(record["samples_per_schedule_step"])
        else:
            warnings.warn("the checkpoint has no adaptive batch: the batch begins with its first window", stacklevel=1)
        self._apply()
