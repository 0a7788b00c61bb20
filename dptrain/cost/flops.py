"""The FLOPs of a run's forward and backward passes, counted while they run; what they cost stands in the ledger."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dptrain.models.expert_parallel import own_rows_ratio
from dptrain.tasks.base import Batch

Shape = Sequence[int]

_aten = torch.ops.aten


class FlopCounter:
    """Counts the FLOPs of forward and backward passes: once for each shape of micro-batch, remembered from then on.

    The first real pass of a shape runs under torch's counter, which looks on and changes no number. A dry pass on the
    side would cost memory, draw random numbers, move the statistics of batch norms, and call whatever a task does in
    its loss a second time; the price of doing without one is a pass of each shape that takes about twice its time.

    What is counted are matrix products, those of experts too, convolutions, attention and recurrent layers: a
    multiplication and an addition are two, attention is the full square, also where it is causal, and its backward pass
    is twice the forward one, whichever kernel does it. Kernels that torch does not know of are not seen, nor is a pass
    whose cost depends on more than the shape of its batch seen anew.

    A block that runs again in the backward pass, because its activations were not kept, counts once: the FLOPs are
    those that the model needs, of which the utilisation is a share (arXiv 2204.02311). What a task computes again by
    itself counts as often as it is computed.

    Of experts that ranks share out, a rank counts the work of its own samples, whichever ranks do it.

    Args:
        model: whose passes are counted, where it may have experts.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._model = nn.Module() if model is None else model
        self._known: dict[Hashable, int] = {}
        self._flops = 0
        self._num_samples = 0

    def counting(self, batch: Batch, *, num_samples: int) -> AbstractContextManager[None]:
        """Count what runs inside: the forward and the backward pass of one micro-batch. No host sync.

        Args:
            batch: as it goes into the loss.
            num_samples: in it that count; a pass of none is left out.
        """
        shape = _shape(batch)
        if shape in self._known:
            return _KnownPass(partial(self._add, shape, num_samples))
        return self._counted(shape, num_samples)

    @contextmanager
    def _counted(self, shape: Hashable, num_samples: int) -> Iterator[None]:
        with uncompiled(), FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            _active.append(counter)
            try:
                yield
            finally:
                _active.remove(counter)
        ratio = own_rows_ratio(self._model)
        if ratio is None:  # the next pass of this shape is counted in its place
            return
        # Where nothing was counted there is no such entry.
        of_experts = counter.get_flop_counts().get("Global", {}).get(_aten._grouped_mm, 0)  # noqa: SLF001 - as below
        self._known[shape] = counter.get_total_flops() + round(of_experts * (ratio - 1))
        self._add(shape, num_samples)

    def _add(self, shape: Hashable, num_samples: int) -> None:
        if num_samples:
            self._flops += self._known[shape]
            self._num_samples += num_samples

    def state(self) -> list[Any]:
        """Return what a checkpoint must hold: a pass that is counted runs uncompiled, and so in other last bits."""
        return [[shape, flops] for shape, flops in self._known.items()]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from a `state`."""
        self._known = {_hashable(shape): int(flops) for shape, flops in state}

    def take_per_sample(self) -> float | None:
        """Return the mean FLOPs per sample since the last call, None where nothing was counted.

        Per sample, since replicas may have different shares of a step: times the global batch it is the step's.
        """
        per_sample = self._flops / self._num_samples if self._flops else None
        self._flops = self._num_samples = 0
        return per_sample


class _KnownPass:
    """Adds a pass at its end where it did not fail. Not by a generator, whose way through contextlib is 2 µs longer."""

    def __init__(self, add: Callable[[], None]) -> None:
        self._add = add

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._add()


_active: list[FlopCounterMode] = []
"""The counters that look on."""


def is_counting() -> bool:
    """Whether FLOPs are being counted."""
    return bool(_active)


def recomputation() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a forward pass and of its repetition, a `context_fn` of `checkpoint`: one counts."""
    return nullcontext(), _not_counted()


@contextmanager
def _not_counted() -> Iterator[None]:
    """Set the counters back to what they were, also where the repetition ends early, which it does by an error."""
    before = [(counter, counter.get_flop_counts()) for counter in _active]
    try:
        yield
    finally:
        for counter, counts in before:
            counter.flop_counts.clear()
            for module, of_module in counts.items():
                counter.flop_counts[module].update(of_module)


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled functions run as they are written.

    Where dynamo meets torch's counter, or any other mode of its kind, in a function that it is about to compile, it
    leaves that function alone from then on, without a word.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes two seconds
        return nullcontext()
    return cast("AbstractContextManager[object]", torch.compiler.set_stance("force_eager"))


def _hashable(shape: Any) -> Hashable:  # noqa: ANN401 - of JSON
    return tuple(map(_hashable, shape)) if isinstance(shape, (list, tuple)) else shape


def _shape(batch: Batch) -> Hashable:
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    if isinstance(batch, Mapping):
        return tuple((key, _shape(value)) for key, value in batch.items())
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return tuple(map(_shape, batch))
    return type(batch).__name__


# Torch's own formulas leave out attention on the CPU, fused recurrent layers and grouped products. They count the
# weight gradient of a convolution in groups as if it had none: 32 times too much for a depthwise one of 32 channels.
# They count the backward pass of fused attention as five products to the forward pass's two, for such kernels compute
# one of them again; the plain form of the same attention has four. Here it is four for all: the FLOPs of a model are
# not those of a kernel.


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:  # noqa: ANN401 - as torch calls it
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward(_grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:  # noqa: ANN401 - the same
    return 2 * _attention(query, key, value)


def _recurrent_layer(inputs: Shape, to_input: Shape, to_hidden: Shape, *_: Any, **__: Any) -> int:  # noqa: ANN401 - the same
    return _recurrent(inputs, [to_input, to_hidden])


def _recurrent(inputs: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:  # noqa: ANN401 - the same
    """Each matrix is multiplied with one vector at each place of each sequence."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)


def _recurrent_layer_backward(*args: Any, **kwargs: Any) -> int:  # noqa: ANN401 - the same
    return 2 * _recurrent_layer(*args, **kwargs)


def _recurrent_backward(*args: Any, **kwargs: Any) -> int:  # noqa: ANN401 - the same
    return 2 * _recurrent(*args, **kwargs)


def _grouped_product(left: Shape, right: Shape, *_: Any, **__: Any) -> int:  # noqa: ANN401 - the same
    """Each row belongs to one group at most: experts cost what one of them costs on all rows.

    Rows behind the last group, of tokens past an expert's capacity, are counted though they are not computed: how many
    there are is no shape.
    """
    of_one_group = left[1:] if (len(left), len(right)) == (3, 2) else left
    return 2 * math.prod(of_one_group) * right[-1]


def _convolution_backward(
    grad: Shape,
    inputs: Shape,
    weight: Shape,
    _bias: Any,  # noqa: ANN401 - as torch calls it
    _stride: Any,  # noqa: ANN401 - the same
    _padding: Any,  # noqa: ANN401 - the same
    _dilation: Any,  # noqa: ANN401 - the same
    transposed: bool,  # noqa: FBT001 - the same
    _output_padding: Any,  # noqa: ANN401 - the same
    _groups: Any,  # noqa: ANN401 - the same
    wanted: Sequence[bool],
    **_kwargs: Any,  # noqa: ANN401 - the same
) -> int:
    """Each gradient that is wanted, of inputs and of weights, takes the products of the forward pass."""
    places = (inputs if transposed else grad)[2:]
    return 2 * inputs[0] * math.prod(places) * math.prod(weight) * sum(wanted[:2])


FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # noqa: SLF001 - torch's operators have no others
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,  # noqa: SLF001
    _aten._scaled_dot_product_flash_attention_backward: _attention_backward,  # noqa: SLF001
    _aten._scaled_dot_product_efficient_attention_backward: _attention_backward,  # noqa: SLF001
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,  # noqa: SLF001
    _aten.mkldnn_rnn_layer: _recurrent_layer,
    _aten.mkldnn_rnn_layer_backward: _recurrent_layer_backward,
    _aten._cudnn_rnn: _recurrent,  # noqa: SLF001
    _aten._cudnn_rnn_backward: _recurrent_backward,  # noqa: SLF001
    _aten.convolution_backward: _convolution_backward,
    _aten._grouped_mm: _grouped_product,  # noqa: SLF001
}
