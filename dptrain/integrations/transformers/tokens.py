"""The share of a micro-batch in a loss that the Trainer normalises by the tokens of the whole step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from dptrain.errors import ObservationError


class TokenShares:
    """Counts tokens where the Trainer's loss does.

    Args:
        args: the Trainer's; None before training begins.
    """

    def __init__(self, args: TrainingArguments | None = None) -> None:
        self._args = args
        self._warned = False

    def of(self, model: nn.Module, inputs: Mapping[str, Any], *, micro_steps: int) -> float | None:
        """Return the weight of a micro-batch; None where all of a step weigh the same.

        It is the micro-batch's tokens over those that its loss is divided by, times the replicas where these are the
        tokens of all of them. A loss function of the user's own gets the labels in the model's place, so that nobody
        knows here what it does with them.

        Args:
            model: the one that computes the loss.
            inputs: what it is called with, by name.
            micro_steps: micro-batches of the step on each replica, as planned.

        Raises:
            ObservationError: with label smoothing, which normalises by tokens that cannot be counted here.
        """
        assert self._args is not None
        num_items = inputs.get("num_items_in_batch")
        if num_items is None:
            return None
        labels = inputs.get("shift_labels")
        if labels is None:
            labels = inputs.get("labels")
            if labels is None:
                self._without_labels(num_items, micro_steps=micro_steps)
                return None
            if _shifts_labels(model):
                labels = labels[..., 1:]
        # Waits for the device, as the Trainer does after each micro-batch to look for a loss that is not finite.
        return float(labels.ne(-100).sum() / num_items) * self._replicas

    @property
    def _replicas(self) -> int:
        """Replicas whose tokens are counted together."""
        assert self._args is not None
        return self._args.world_size if self._args.average_tokens_across_devices else 1

    def _without_labels(self, num_items: float, *, micro_steps: int) -> None:
        assert self._args is not None
        if self._args.label_smoothing_factor > 0:
            raise ObservationError(
                "with label smoothing the loss is normalised by num_items_in_batch outside of the model, which is not "
                "given the labels, so the weights of micro-batches are unknown: set label_smoothing_factor=0"
            )
        # With one label for each sample the micro-batches of a step weigh the same, whether or not it divides by them.
        num_samples = self._args.train_batch_size * micro_steps * self._replicas
        if not self._warned and num_items > num_samples:
            self._warned = True
            warnings.warn(
                "the loss is computed outside of the model from num_items_in_batch tokens, whose number in each "
                "micro-batch is unknown here: all micro-batches are taken to weigh the same. If yours differ in "
                "tokens and the loss is divided by num_items_in_batch, set it as model.loss_function in place of "
                "compute_loss_func",
                stacklevel=2,
            )


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the loss leaves the first label of each sequence out; the Trainer's own count misses some such models."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_function", None) is ForCausalLMLoss
