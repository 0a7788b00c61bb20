"""How many samples a forward pass has, read off its inputs where they leave no doubt; else an error that asks."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dptrain.errors import ObservationError
from dptrain.observe.loop.sizes import checked_size

MicroBatchSize = int | Callable[..., int]
"""Samples in a micro-batch, or a function of the model's arguments that returns them."""

_REMEDY = "give attach(..., micro_batch_size=), a number or a function of the model's arguments"
_SEQUENCE_NAMES = ("input_ids", "inputs_embeds", "input_values", "input_features")
"""Arguments of transformers' models whose first dimension is the batch, or rows of packed sequences."""


class _DoubtError(Exception):
    """The inputs do not say the batch size; the remedy depends on what the user called."""


def batch_size(
    given: MicroBatchSize | None, args: Sequence[Any], kwargs: Mapping[str, Any], *, remedy: str = _REMEDY
) -> float:
    """Return the samples of one forward pass.

    Sequences that lie one behind the other in a row (packed, padding-free) are counted one by one.

    Args:
        given: what the user said, or None to look at the inputs.
        args: of the model.
        kwargs: of the model.
        remedy: what an error tells the user to give.

    Raises:
        ObservationError: where the inputs do not say it without doubt, or the function gives no positive number.
    """
    if given is not None:
        if not callable(given):
            return given
        try:
            size = given(*args, **kwargs)
        except Exception as error:
            raise ObservationError(
                f"the function micro_batch_size raised {type(error).__name__}: {error}; it is called with the model's "
                "arguments and must return the samples of the micro-batch"
            ) from error
        return checked_size(size, given_by="the function micro_batch_size")
    return packed_sequences(args, kwargs) or num_rows(args, kwargs, remedy=remedy)


def num_rows(args: Sequence[Any], kwargs: Mapping[str, Any], *, remedy: str = _REMEDY) -> int:
    """Return the first dimension that the inputs of one forward pass share, however many sequences a row holds.

    Args:
        args: of the model.
        kwargs: of the model.
        remedy: what an error tells the user to give.

    Raises:
        ObservationError: where they do not say it without doubt.
    """
    try:
        return _num_rows(args, kwargs)
    except _DoubtError as doubt:
        raise ObservationError(f"{doubt}: {remedy}") from None


def _num_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    named = [value for key, value in _named(args, kwargs) if key in _SEQUENCE_NAMES and isinstance(value, Tensor)]
    looked_at: list[Any] = [*named] or [list(args), dict(kwargs)]
    sizes = [size for value in looked_at for size in _sizes(value, top=True)]
    if not sizes:
        raise _DoubtError("the model was called without a tensor, so its batch size is unknown")
    if len(set(sizes)) > 1:
        raise _DoubtError(
            f"the model's inputs have different first dimensions ({', '.join(map(str, sizes[:6]))}), so the batch size "
            "is ambiguous"
        )
    return sizes[0]


def packed_sequences(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Return the number of sequences in rows that hold several of them; None where each row is one sample.

    Such rows come with what keeps their sequences apart: `cu_seq_lens_q` (their ends), `seq_idx` (their numbers), or
    `position_ids` that begin anew without an attention mask. A sequence of one token is padding of the row, or
    predicts nothing, and does not count. Where these tensors are on a device, the host waits for it.

    Args:
        args: of the model.
        kwargs: of the model.
    """
    named = {key: value for key, value in _named(args, kwargs) if isinstance(value, Tensor) and value.dim() > 0}
    if "cu_seq_lens_q" in named:
        return max(int((named["cu_seq_lens_q"].diff() > 1).sum()), 1)
    # A model that is given a mask takes a row for one sequence, and positions may begin anew after its padding.
    if "position_ids" in named and "attention_mask" not in named and not named["position_ids"].is_nested:
        positions = named["position_ids"]
        positions = positions[0] if positions.dim() > 2 else positions.view(-1, positions.size(-1))  # noqa: PLR2004 - several axes, as of images
        num, rows = _sequences(positions == positions.amin(dim=-1, keepdim=True)), positions.size(0)
        if num > rows:
            inputs = [*(named[key] for key in _SEQUENCE_NAMES if key in named), *args]
            return num if rows > 1 else num * _first_dimension(inputs)  # one row of positions serves all
    if "seq_idx" in named:
        numbers = named["seq_idx"].view(-1, named["seq_idx"].size(-1))
        num = _sequences(nn.functional.pad(numbers.diff() != 0, (1, 0)) & (numbers >= 0))
        return num if num > numbers.size(0) else None
    return None


def _sequences(begins: Tensor) -> int:
    """Return how many sequences of more than one token begin in rows of tokens; a row begins with one."""
    begins = begins.clone()
    begins[:, :1] = True
    return int((begins[:, :-1] & ~begins[:, 1:]).sum())


def _first_dimension(inputs: Iterable[object]) -> int:
    return next((value.size(0) for value in inputs if isinstance(value, Tensor) and value.dim() > 1), 1)


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for mapping in (*(arg for arg in args if isinstance(arg, Mapping)), kwargs):
        yield from mapping.items()


def _sizes(value: object, *, top: bool = False) -> Iterator[int]:
    """Walk through the arguments, each tensor's first dimension."""
    if isinstance(value, PackedSequence):
        yield int(value.batch_sizes[0])  # of the first time step, which every sequence has; it lives on the host
    elif isinstance(value, Tensor):
        if value.dim() > 0:
            yield value.size(0)  # a nested tensor of strided layout has no shape
    else:
        items, named = _items(value)
        if not top and not named:
            _refuse_samples(value, items)
        for item in items:
            yield from _sizes(item)


def _items(value: object) -> tuple[list[Any], bool]:
    """Return what a collection holds, and whether each has a name, as parts of one batch have; nothing of others."""
    if isinstance(value, Mapping):
        return list(value.values()), all(isinstance(key, str) for key in value)
    if isinstance(value, (tuple, list, deque, set, frozenset)):
        return list(value), hasattr(value, "_fields")
    if isinstance(value, SimpleNamespace):
        return list(vars(value).values()), True
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)], True
    return [], True


def _refuse_samples(value: object, items: list[Any]) -> None:
    """Raise where the items of a collection are as likely the samples as parts of one batch.

    That is so for tensors of one rank (a list of images), and for records of one sample each (detectron2's list of
    dicts).
    """
    tensors = [item for item in items if isinstance(item, Tensor)]
    alike = len({item.dim() for item in tensors}) == 1
    records = sum(isinstance(item, Mapping) and any(map(_holds_tensors, item.values())) for item in items)
    if (tensors and alike) or records:
        kind = "tensors" if tensors else "records"
        raise _DoubtError(
            f"the model was called with a {type(value).__name__} of {len(tensors) or records} {kind}, whose length or "
            "whose first dimension may be the batch size"
        )


def refuse_second_dimension(
    args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Iterable[Tensor], *, num_samples: float
) -> None:
    """Raise where the output begins with the inputs' second dimension, so that their first may be time.

    Args:
        args: of the model.
        kwargs: of the model.
        outputs: tensors that it returned.
        num_samples: first dimension of the inputs.

    Raises:
        ObservationError: with the remedy.
    """
    begins = {tensor.size(0) for tensor in outputs if tensor.dim() > 0}
    begins.discard(1)  # a loss of one element begins so too, see `output_is_in_doubt`
    inputs = list(_dense([list(args), dict(kwargs)]))
    if not begins or num_samples in begins or _are_packed(inputs, num_samples=num_samples):
        return
    seconds = {tensor.size(1) for tensor in inputs if tensor.dim() > 1}
    if begins & seconds:
        raise ObservationError(
            f"the inputs begin with {num_samples} and the output with {min(begins & seconds)}, the inputs' second "
            f"dimension, so the batch size may be either: {_REMEDY}"
        )


def output_is_in_doubt(
    args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[Tensor], *, num_samples: float
) -> bool:
    """Say whether the output speaks against the inputs' first dimension as the samples.

    An output with fewer rows was pooled (nodes to graphs, views to pairs), or the first dimension is that of a single
    sample (an image without a batch, features first). Rows of which there are more may be tokens, or places chosen by
    a mask: only a vector of another length, or the inputs' second dimension kept in its place, is in doubt.

    Args:
        args: of the model.
        kwargs: of the model.
        outputs: differentiable tensors that it returned.
        num_samples: first dimension of the inputs.
    """
    inputs = list(_dense([list(args), dict(kwargs)]))
    if not outputs or not inputs or _say_the_batch(args, kwargs) or _are_packed(inputs, num_samples=num_samples):
        return False
    # Of several inputs that agree, one element is the loss too; of a single input it may be what one sample gives.
    if any(tensor.dim() == 0 or (tensor.shape == (1,) and len(inputs) > 1) for tensor in outputs):
        # The loss, and what comes with it is about it. Of a single vector nobody knows whether it is one sample.
        return all(tensor.dim() <= 1 and tensor.is_floating_point() for tensor in inputs)
    rows = {tensor.size(0) for tensor in outputs}
    seconds = {tensor.size(1) for tensor in inputs if tensor.dim() > 1}
    if num_samples not in rows and (rows & seconds) - {1}:
        return True  # time first, which is an error in training mode
    if any(count % num_samples == 0 for count in rows):
        return False
    transposed = any(tensor.dim() > 1 and tensor.size(1) in seconds for tensor in outputs)
    return max(rows) < num_samples or transposed or all(tensor.dim() == 1 for tensor in outputs)


def _say_the_batch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the inputs are of a kind whose batch size is known, however the output looks."""
    if any(key in _SEQUENCE_NAMES for key, _ in _named(args, kwargs)):
        return True
    values = (*args, *kwargs.values())
    return any(isinstance(x, PackedSequence) or (isinstance(x, Tensor) and x.is_nested) for x in values)


def _are_packed(inputs: Iterable[Tensor], *, num_samples: float) -> bool:
    """Whether the samples were counted within rows: then they are no first dimension, of the output neither."""
    sizes = {tensor.size(0) for tensor in inputs if tensor.dim() > 0}
    return num_samples > 1 and num_samples not in sizes


def _dense(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if not value.is_nested:
            yield value
    elif not isinstance(value, PackedSequence):
        for item in _items(value)[0]:
            yield from _dense(item)


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensors, value)))


def refuse_time_first(model: nn.Module, *, remedy: str = _REMEDY) -> None:
    """Raise where a module of the model takes time, not samples, as its first dimension.

    Args:
        model: whose modules are looked at.
        remedy: what the error tells the user to give.

    Raises:
        ObservationError: with the remedy.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.RNNBase, nn.Transformer, nn.MultiheadAttention)) and not module.batch_first:
            raise ObservationError(
                f"{name or 'the model'} is a {type(module).__name__} with batch_first=False, so the first dimension of "
                f"the inputs may be time: {remedy}"
            )
