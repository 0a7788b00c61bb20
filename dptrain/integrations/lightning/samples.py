"""How many samples a batch of Lightning's data loader has, or an error that asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dptrain.errors import ObservationError
from dptrain.observe.loop.batch_size import batch_size, refuse_time_first

_REMEDY = "give NoiseScaleMonitor(micro_batch_size=), a number or a function of the batch"


class BatchSamples:
    """Reads the samples off a batch where it leaves no doubt, by the rules of `dptrain.attach`.

    Args:
        given: what the user said, or None to look at the batch.
    """

    def __init__(self, given: int | Callable[[Any], int] | None) -> None:
        self._given = given
        self._looked_at: LightningModule | None = None

    def of(self, batch: Any, trainer: Trainer, module: LightningModule, number: int) -> float:  # noqa: ANN401 - any batch
        """Return the samples of a batch.

        Args:
            batch: as the data loader gives it.
            trainer: the one that gives it to the module.
            module: whose `training_step` gets it.
            number: of the batch within its epoch.

        Raises:
            ObservationError: with the remedy.
        """
        if self._given is not None:
            return batch_size(self._given, (batch,), {})
        if self._looked_at is not module:
            refuse_time_first(module, remedy=_REMEDY)
            self._looked_at = module
        args, kwargs = _arguments(batch)
        num_samples = batch_size(None, args, kwargs, remedy=_REMEDY)
        loaded = _loaded(trainer.train_dataloader)
        # Only the last batch of an epoch has fewer; with several workers on a stream others than the very first may.
        is_full = number == 0 and not trainer.is_last_batch
        if loaded is not None and (num_samples > loaded or (is_full and num_samples < loaded)):
            raise ObservationError(
                f"the tensors of a batch begin with {num_samples}, but the data loader's batch size is {loaded}: "
                f"{_REMEDY}"
            )
        return num_samples


class PlannedSamples(BatchSamples):
    """Takes the batch size that was planned, and reads an epoch's last batch, which may have fewer.

    Args:
        planned: samples in each batch but the last.
    """

    def __init__(self, planned: int) -> None:
        super().__init__(None)
        self._planned = planned

    def of(self, batch: Any, trainer: Trainer, module: LightningModule, number: int) -> float:  # noqa: ANN401 - any batch
        """Return the samples of a batch."""
        if not trainer.is_last_batch:
            return self._planned
        try:
            return min(super().of(batch, trainer, module, number), self._planned)
        except ObservationError:
            return self._planned


def _loaded(loader: Any) -> int | None:  # noqa: ANN401 - whatever the trainer was given
    """Return a data loader's batch size, where it is one loader that knows it."""
    known = [getattr(one, "batch_size", None) for one in (loader, getattr(loader, "batch_sampler", None))]
    return next((size for size in known if isinstance(size, int)), None)


def _arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:  # noqa: ANN401 - any batch
    """Return a batch as the arguments of a model: the default collation makes a list of inputs and targets."""
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        return (), batch
    if type(batch) in (tuple, list):
        return tuple(batch), {}
    return (batch,), {}
