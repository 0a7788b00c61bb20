"""The meter as a callback of Lightning's Trainer; what changes the batch stands in `batch_size`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from dptrain.errors import ObservationError
from dptrain.integrations.lightning.samples import BatchSamples
from dptrain.observe import Meter, Reading
from dptrain.observe.build import Options, build_meter
from dptrain.observe.hooks.wrapping import identify


class NoiseScaleMonitor(Callback):
    """Measures the gradient noise scale and logs it as `noise_scale/…` every `log_every_n_steps`.

    The loss that `training_step` returns is taken to be the mean over its batch, or the sum with `loss="sum"`.

    Args:
        loss: whether the loss is the mean or the sum over the samples.
        micro_batch_size: samples in a batch, or a function of the batch that returns them; by default the first
            dimension that all its tensors share, which must not contradict the data loader's batch size.
        options: those of `dptrain.attach` that say what is measured and how: `method`, `groups`, `geometry` (with
            `optimizers`), `every`, `budget`, `comm_hook`, `smoothing`, `level`, `population`.

    Raises:
        ObservationError: when training begins, where the meter could not be right.
    """

    def __init__(
        self,
        *,
        loss: Literal["mean", "sum"] = "mean",
        micro_batch_size: int | Callable[[Any], int] | None = None,
        **options: Any,  # noqa: ANN401 - those of attach, which names their types
    ) -> None:
        self._summed, self._samples = loss == "sum", BatchSamples(micro_batch_size)
        self._options = options
        self._saved: dict[str, Any] | None = None
        self._micro_steps = 0
        self._scale = 1.0
        self.meter: Meter | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the meter on the parameters, now that the strategy has wrapped them."""
        _refuse(trainer, pl_module)
        self._remove()
        wrapped = trainer.strategy.model or pl_module
        self.meter = build_meter(identify(wrapped), Options(loss_scale=lambda: self._scale, **self._options))
        if self._saved is not None:
            self._restore(self._saved)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401 - Lightning's signature
        """Announce a micro-batch."""
        assert self.meter is not None
        num_samples = self._samples.of(batch, trainer, pl_module, batch_idx) if self.meter.measuring else 1
        self.meter.begin(num_samples=num_samples, weight=num_samples if self._summed else None)
        self._micro_steps += 1

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:  # noqa: ARG002 - Lightning's signature
        """Close the step; Lightning clips after this. It may have unscaled before: the meter finds that factor."""
        assert self.meter is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        amplified = 1.0 if scaler is None else float(scaler.get_scale())
        # The loss was divided by the planned accumulation steps; the last window of an epoch may have fewer.
        self._scale = amplified * self._micro_steps / trainer.accumulate_grad_batches
        self.meter.step()
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
            "with dptrain.attach(model, optimizer=self.optimizers()) in on_train_start"
        )
    # By exact type: DeepSpeed's and XLA's strategies derive from these two, and reduce gradients in their own way.
    if type(trainer.strategy) not in (DDPStrategy, SingleDeviceStrategy, ModelParallelStrategy):
        raise ObservationError(
            f"{type(trainer.strategy).__name__} shards or reduces gradients where no replica's own gradient can be "
            "seen by this callback: use strategy='ddp', ModelParallelStrategy with fully_shard, or a single device"
        )
