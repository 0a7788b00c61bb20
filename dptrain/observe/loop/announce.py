"""Tells the meter of each forward pass of a model, with the number of its samples, in the loop's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dptrain.errors import ObservationError
from dptrain.observe.hooks.join import check_model
from dptrain.observe.loop.batch_size import MicroBatchSize, batch_size, refuse_time_first
from dptrain.observe.meter import Meter


def announce_forward_passes(
    model: nn.Module, *, meter: Meter, micro_batch_size: MicroBatchSize | None, summed: bool
) -> None:
    """Put hooks on `model` that announce its forward passes to `meter`, until the meter is removed.

    A pass in evaluation mode counts as well where it has gradients: fine-tuning with frozen dropout and batch norm is
    such a loop. A pass without a backward pass does not count: the meter replaces it by the next one, and where it sees
    accumulated gradients only, a pass counts when its backward pass reaches its output.

    Args:
        model: the module that the loop calls.
        meter: that is notified.
        micro_batch_size: see `attach`.
        summed: whether the loss is the sum over the samples.
    """
    announcer = _Announcer(model, meter, micro_batch_size, summed=summed)
    before = _outside_of_graphs(announcer.before)
    meter.on_remove(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    if meter.accumulated:
        after = _outside_of_graphs(announcer.after)
        meter.on_remove(model.register_forward_hook(after, with_kwargs=True).remove)


class _Announcer:
    def __init__(self, model: nn.Module, meter: Meter, given: MicroBatchSize | None, *, summed: bool) -> None:
        self._model = model
        self._meter = meter
        self._given = given
        self._summed = summed
        self._time_first_refused = given is not None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Announce a pass whose gradients are seen one by one."""
        if not torch.is_grad_enabled():
            return
        check_model(getattr(self._model, "_orig_mod", self._model), meter=self._meter)
        if self._meter.by_hand:
            return
        if not self._meter.measuring:
            self._meter.count_forward()
        elif not self._meter.accumulated:
            self._begin(self._num_samples(module, args, kwargs))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """Announce a pass once its backward pass begins, which no other hook would tell of."""
        if not torch.is_grad_enabled() or self._meter.by_hand or not self._meter.measuring:
            return
        waiting = [self._num_samples(module, args, kwargs)]

        def reached(_: Tensor) -> None:
            if waiting:
                self._begin(waiting.pop())

        differentiable = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        for tensor in differentiable:
            tensor.register_hook(reached)  # type: ignore[no-untyped-call]
        if not differentiable:
            self._begin(waiting.pop())  # an object that cannot be looked into

    def _begin(self, num_samples: int | None) -> None:
        if num_samples is not None:
            self._meter.begin_forward(num_samples=num_samples, weight=num_samples if self._summed else None)

    def _num_samples(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        try:
            if not self._time_first_refused and not any(isinstance(arg, PackedSequence) for arg in args):
                refuse_time_first(self._model)
                self._time_first_refused = True
            return batch_size(self._given, args, kwargs)
        except ObservationError:
            if module.training:
                raise
            return None  # an evaluation may be called in other ways; where it is trained on, the next check tells


def _outside_of_graphs(hook: Callable[..., None]) -> Callable[..., None]:
    """Keep a hook out of compiled graphs.

    Where the model is compiled in place, its hooks are inside. Elsewhere the way round dynamo would cost 20 µs a call
    for nothing.
    """
    outside = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]

    def called(*args: Any) -> None:  # noqa: ANN401 - those of torch's hooks
        (outside if torch.compiler.is_dynamo_compiling() else hook)(*args)

    return called


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
