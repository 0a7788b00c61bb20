"""The share of a micro-batch in a loss that the Trainer normalises by the tokens of the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from dptrain.errors import ObservationError


def token_share(model: nn.Module, inputs: Mapping[str, Any]) -> float | None:
    """Return a micro-batch's tokens over those that its loss is divided by; None where the loss is a plain mean.

    Args:
        model: the one that computes the loss.
        inputs: what it is called with, by name.

    Raises:
        ObservationError: where the loss is normalised by tokens that cannot be counted here.
    """
    num_items = inputs.get("num_items_in_batch")
    if num_items is None:
        return None
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        if labels is None:
            raise ObservationError(
                "the loss is normalised by num_items_in_batch but the model is not given the labels (as with "
                "label smoothing), so the weights of micro-batches are unknown: set label_smoothing_factor=0"
            )
        if _shifts_labels(model):
            labels = labels[..., 1:]
    # Waits for the device, as the Trainer does after each micro-batch to look for a loss that is not finite.
    return float(labels.ne(-100).sum() / num_items)


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the loss leaves the first label of each sequence out; the Trainer's own count misses some such models."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_function", None) is ForCausalLMLoss
