"""Whether the rows that a Trainer's model is called with are the samples that its data loader gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from dptrain.errors import ObservationError
from dptrain.observe.loop.batch_size import num_rows

REMEDY = "give micro_batch_size=, the number of samples in a micro-batch"


class RowCheck:
    """Compares the first dimension of the model's inputs with the batch size of the Trainer's data loader.

    A collator may make several rows of a sample (chosen and rejected, negatives, choices) or one row of all samples.
    Only the last batch of an epoch has fewer samples than the loader's batch size.

    Args:
        args: the Trainer's.
        first_is_full: whether the first batch is known not to be the last of an epoch.
    """

    def __init__(self, args: TrainingArguments, *, first_is_full: bool) -> None:
        divided = args.accelerator_config.split_batches  # type: ignore[union-attr]  # made into one by the Trainer's arguments
        self._loaded = args.train_batch_size // (args.world_size if divided else 1)
        self._is_full = first_is_full

    def check(self, inputs: Mapping[str, Any], *, num_samples: float) -> None:
        """Look at one micro-batch.

        Args:
            inputs: of the model, by name.
            num_samples: what was read off them; more than the rows where these hold several sequences.

        Raises:
            ObservationError: with the remedy.
        """
        rows, is_full = num_rows((), inputs, remedy=REMEDY), self._is_full
        self._is_full = False
        packed = num_samples != rows
        if rows > self._loaded or (is_full and not packed and rows < self._loaded):
            raise ObservationError(
                f"the model is called with {rows} rows where the data loader gives {self._loaded} samples (pairs, "
                f"negatives or flattened sequences of a collator?): {REMEDY}, such as {self._loaded}"
            )
