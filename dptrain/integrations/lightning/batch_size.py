"""The batch that follows the noise scale, as a callback of Lightning's Trainer; the measuring is in `monitor`."""

from __future__ import annotations

from typing import Any, Self

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer

from dptrain.control import RuleName
from dptrain.control.settings import ControlConfig
from dptrain.errors import ConfigError
from dptrain.integrations import batch_adapter as adapter
from dptrain.integrations.lightning.monitor import NoiseScaleMonitor
from dptrain.integrations.lightning.samples import PlannedSamples
from dptrain.integrations.sample_schedule import SampleSchedule


class _Window(int):
    """Accumulation steps of a window that may begin at any batch of the epoch.

    Lightning clears gradients and steps where the number of a batch has no remainder by the accumulation steps; this is
    such a number, whose remainders count from the window's first batch.
    """

    def __new__(cls, steps: int, first: int = 0) -> Self:
        window = super().__new__(cls, steps)
        window._first = first
        return window

    def __rmod__(self, batch: int) -> int:
        return (batch - self._first) % int(self)

    _first: int


class BatchAdapter(NoiseScaleMonitor):
    """Measures, and lets `trainer.accumulate_grad_batches` follow.

    Law, limits and step timing are those of `dptrain.BatchAdapter`. Schedulers that are stepped with the updates are
    advanced by samples, so they end where they would without adapting.

    Args:
        micro_batch_size: samples in one batch of one replica's data loader.
        control: law and limits; by default those of `dptrain train`.
        rule: how the learning rate follows the batch; by default that of `dptrain train` for this optimizer.
        max_samples: length of the run, where it is known.
        options: further settings of `NoiseScaleMonitor`. Each step is measured where `every` is not among
            them: an interval that rests on timings would make two runs take different decisions.
    """

    def __init__(
        self,
        *,
        micro_batch_size: int,
        control: ControlConfig | None = None,
        rule: RuleName | None = None,
        max_samples: int | None = None,
        **options: Any,  # noqa: ANN401 - those of the monitor, which names their types
    ) -> None:
        super().__init__(**{"every": 1, **options})
        self._samples = PlannedSamples(micro_batch_size)
        self._settings: dict[str, Any] = {
            "micro_batch_size": micro_batch_size,
            "control": control,
            "rule": rule,
            "max_samples": max_samples,
        }
        self._closed_micro_steps: int | None = None
        self.adapter: adapter.BatchAdapter | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what sets the accumulation steps too."""
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]  # the same
            raise ConfigError("GradientAccumulationScheduler sets the accumulation steps too: remove one of the two")
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        """Take the first window from the trainer, or from the checkpoint, now that there is an optimizer."""
        assert self.meter is not None
        self.adapter = adapter.BatchAdapter(
            self.meter,
            trainer.optimizers[0],
            accumulation_steps=trainer.accumulate_grad_batches,
            **self._settings,
        )
        self._schedule = SampleSchedule(reference_batch_size=self.adapter.global_batch_size)
        self._schedule.follow(one.scheduler for one in trainer.lr_scheduler_configs if one.interval == "step")
        self.meter.on_remove(self._schedule.release)
        if self._saved_adapter is not None:
            self.adapter.load_state_dict(self._saved_adapter)
            self._schedule.plan_for(self.adapter.reference_batch_size)
            self._schedule.restore(self._saved_adapter.get("schedule", ()))
            self._saved_adapter = None  # a second fit begins anew, as its meter does
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        trainer.accumulate_grad_batches = _Window(self.adapter.accumulation_steps, first=done)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401 - Lightning's signature
        """Announce a micro-batch; the first one of a step begins the window."""
        assert self.adapter is not None
        if not self._micro_steps:
            trainer.accumulate_grad_batches = _Window(self.adapter.accumulation_steps, first=batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Close the step. What is known before it decides on the next window, so that nobody waits for this one."""
        assert self.meter is not None
        assert self.adapter is not None
        self.adapter.note(self.meter.read())
        self._closed_micro_steps = self._micro_steps
        self._schedule.note(self.adapter.samples_per_micro_step * self._micro_steps)
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def on_train_batch_end(self, *_: object) -> None:
        """Decide on the next window, where an update was made."""
        if self._closed_micro_steps is None:
            return
        assert self.adapter is not None
        micro_steps, self._closed_micro_steps = self._closed_micro_steps, None
        self.adapter.decide(micro_steps=micro_steps, has_stepped=True)

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` and `batch/…` (synchronises the device)."""
        return {**super().as_metrics(), **({} if self.adapter is None else self.adapter.as_metrics())}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        record = super().state_dict()
        if not record or self.adapter is None:
            return record
        return {**record, "adapter": {**self.adapter.state_dict(), "schedule": self._schedule.state()}}

    _saved_adapter: dict[str, Any] | None = None

    def _restore(self, record: dict[str, Any]) -> None:
        super()._restore(record)
        self._saved_adapter = record["adapter"]
