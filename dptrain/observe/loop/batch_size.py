"""How many samples a forward pass has, read off its inputs where they leave no doubt; else an error that asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dptrain.errors import ObservationError

MicroBatchSize = int | Callable[..., int]
"""Samples in a micro-batch, or a function of the model's arguments that returns them."""

_REMEDY = "give attach(..., micro_batch_size=), a number or a function of the model's arguments"
_SEQUENCE_NAMES = ("input_ids", "inputs_embeds", "input_values", "input_features")
"""Arguments of transformers' models whose first dimension is always the batch, whatever else they are given."""


def batch_size(given: MicroBatchSize | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the samples of one forward pass.

    Args:
        given: what the user said, or None to look at the inputs.
        args: of the model.
        kwargs: of the model.

    Raises:
        ObservationError: where the inputs do not say it without doubt.
    """
    if given is not None:
        return given(*args, **kwargs) if callable(given) else given
    named = [value for key, value in _named(args, kwargs) if key in _SEQUENCE_NAMES and isinstance(value, Tensor)]
    looked_at: list[Any] = [*named] or [list(args), dict(kwargs)]
    sizes = [size for value in looked_at for size in _sizes(value, top=True)]
    if not sizes:
        raise ObservationError(f"the model was called without a tensor, so its batch size is unknown: {_REMEDY}")
    if len(set(sizes)) > 1:
        raise ObservationError(
            f"the model's inputs have different first dimensions ({', '.join(map(str, sizes[:6]))}), so the batch size "
            f"is ambiguous: {_REMEDY}"
        )
    return sizes[0]


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for mapping in (*(arg for arg in args if isinstance(arg, Mapping)), kwargs):
        yield from mapping.items()


def _sizes(value: object, *, top: bool = False) -> Iterator[int]:
    """Walk through the arguments, each tensor's first dimension."""
    if isinstance(value, PackedSequence):
        yield int(value.batch_sizes[0])  # of the first time step, which every sequence has; it lives on the host
    elif isinstance(value, Tensor):
        if value.dim() > 0:
            yield value.shape[0]
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _sizes(item)
    elif isinstance(value, (tuple, list)):
        tensors = [item for item in value if isinstance(item, Tensor)]
        # Many tensors of one rank in a sequence are as likely the samples (a list of images) as parts of one batch.
        alike = len({item.dim() for item in tensors}) == 1
        if not top and tensors and alike and not hasattr(value, "_fields"):
            raise ObservationError(
                f"the model was called with a {type(value).__name__} of {len(tensors)} tensors, whose length or whose "
                f"first dimension may be the batch size: {_REMEDY}"
            )
        for item in value:
            yield from _sizes(item)


def refuse_time_first(model: nn.Module) -> None:
    """Raise where a module of the model takes time, not samples, as its first dimension.

    Raises:
        ObservationError: with the remedy.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.RNNBase, nn.Transformer, nn.MultiheadAttention)) and not module.batch_first:
            raise ObservationError(
                f"{name or 'the model'} is a {type(module).__name__} with batch_first=False, so the first dimension of "
                f"the inputs may be time: {_REMEDY}"
            )
