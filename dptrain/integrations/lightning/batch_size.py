"""The batch that follows the noise scale, as a callback of Lightning's Trainer; the measuring is in `monitor`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer

from dptrain.control import Controller, Limits, RuleName
from dptrain.errors import ConfigError
from dptrain.integrations.adaptation import Adaptation, scale_learning_rate
from dptrain.integrations.lightning.monitor import NoiseScaleMonitor
from dptrain.noise import NoiseScale


class BatchAdapter(NoiseScaleMonitor):
    """Measures, and lets `trainer.accumulate_grad_batches` follow.

    Lightning steps where the number of the batch within the epoch is a multiple of the accumulation steps, so a
    new number comes into force where it divides the batches done: elsewhere one window would be cut. Schedulers
    are stepped as ever, once per update, of which a run whose batch grows has fewer.

    Args:
        micro_batch_size: samples in one batch of one replica's data loader.
        law: decides on the global batch, such as `NoiseLaw()`.
        limits: what the batch may do.
        rule: how the learning rate follows the batch; a factor on the rates that the groups hold.
        options: further settings of `NoiseScaleMonitor`. Each step is measured where `every` is not among
            them: an interval that rests on timings would make two runs take different decisions.
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
        super().__init__(**{"every": 1, **options})
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
        """Return flat floats under `noise_scale/…` and `batch/…` (synchronises the device)."""
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
