"""Tells the meter of each forward pass of a model, with the number of its samples, in the loop's place."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dptrain.errors import ObservationError
from dptrain.observe.checks.reasons import Reason
from dptrain.observe.hooks.join import check_model
from dptrain.observe.hooks.wrapping import refuse_context_parallelism
from dptrain.observe.loop.batch_size import (
    MicroBatchSize,
    batch_size,
    output_is_in_doubt,
    refuse_second_dimension,
    refuse_time_first,
)
from dptrain.observe.meter import Meter


def announce_forward_passes(
    model: nn.Module, *, meter: Meter, micro_batch_size: MicroBatchSize | None, summed: bool, interleaved: bool = False
) -> None:
    """Put hooks on `model` that announce its forward passes to `meter`, until the meter is removed.

    A pass in evaluation mode counts as well where it has gradients: fine-tuning with frozen dropout and batch norm is
    such a loop. A pass without a backward pass does not count: the meter replaces it by the next one, and the size that
    counts is that of the pass whose output the backward pass reaches. Several passes in one backward pass may be parts
    of the same samples (a pair of images) or more samples: unless `micro_batch_size` is given, the step is dropped.

    Args:
        model: the module that the loop calls.
        meter: that is notified.
        micro_batch_size: see `attach`.
        summed: whether the loss is the sum over the samples.
        interleaved: whether a forward pass may come before the backward pass of the one before it, as in a pipeline:
            then a micro-batch begins with its backward pass.
    """
    announcer = _Announcer(model, meter, micro_batch_size, summed=summed, interleaved=interleaved)
    before = _OutsideOfGraphs(announcer.before)
    meter.on_remove(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    after = _OutsideOfGraphs(announcer.after)
    meter.on_remove(model.register_forward_hook(after, with_kwargs=True).remove)


class _Announcer:
    def __init__(
        self, model: nn.Module, meter: Meter, given: MicroBatchSize | None, *, summed: bool, interleaved: bool
    ) -> None:
        self._model = model
        self._meter = meter
        self._given = given
        self._summed = summed
        self._begins_late = meter.accumulated or interleaved
        self._time_first_refused = given is not None
        self._looked_for_context_parallelism = False
        self._announced: float | None = None
        self._num_passes = 0
        self._backward = -1
        self._reached: set[int] = set()

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Announce a pass whose gradients are seen one by one."""
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():  # noqa: SLF001 - no public form
            return  # under vmap or torch.func.grad the tensors are those of one sample, and no .grad comes of them
        if not self._looked_for_context_parallelism:
            refuse_context_parallelism(self._model)
            self._looked_for_context_parallelism = True
        check_model(getattr(self._model, "_orig_mod", self._model), meter=self._meter)
        if not self._meter.measuring:
            # Also for a loop that announces its micro-batches itself: in steps that are measured, alone, it may.
            self._meter.count_forward(training=module.training)
            return
        if self._meter.by_hand:
            return
        size = self._num_samples(module, args, kwargs)
        self._announced = 1 if size == 0 else size
        if not self._begins_late:
            self._begin(self._announced, training=module.training)
        if size == 0:
            self._meter.doubt_step(Reason.EMPTY_BATCH)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """Have the pass known once its backward pass begins, which no other hook would tell of."""
        if not torch.is_grad_enabled() or self._meter.by_hand or not self._meter.measuring:
            return
        num_samples, self._announced = self._announced, None
        if num_samples is None:
            return
        # Not a leaf, such as a parameter that the model returns: it lives on, and its hooks would pile up.
        differentiable = [tensor for tensor in _tensors(output) if tensor.grad_fn is not None]
        in_doubt = self._in_doubt(args, kwargs, differentiable, num_samples=num_samples, training=module.training)
        self._num_passes += 1
        number, waiting = self._num_passes, [num_samples]

        def reached(_: Tensor) -> None:
            """Announce the pass, once: its backward pass has begun."""
            alone = self._note(number)
            if not waiting or self._meter.by_hand:
                return
            waiting.clear()
            if in_doubt:
                self._meter.doubt_step(Reason.OTHER_ROWS)
            if not alone:
                return
            if self._begins_late:
                self._begin(num_samples)
            else:
                # The pass announced last may have been one for a metric, which has no backward pass.
                self._meter.resize_last(num_samples=num_samples, weight=num_samples if self._summed else None)

        for tensor in differentiable:
            tensor.register_hook(reached)  # type: ignore[no-untyped-call]
        if self._begins_late and not differentiable:
            self._begin(num_samples)  # an object that cannot be looked into

    def _in_doubt(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        outputs: list[Tensor],
        *,
        num_samples: float,
        training: bool,
    ) -> bool:
        """Whether the output leaves the batch size in doubt; an error where it begins with the second dimension."""
        if self._given is not None:
            return False
        if training:
            refuse_second_dimension(args, kwargs, outputs, num_samples=num_samples)
        return output_is_in_doubt(args, kwargs, outputs, num_samples=num_samples)

    def _note(self, number: int) -> bool:
        """Note that a backward pass reached a forward pass; return whether it reached no other before."""
        backward = torch._C._current_graph_task_id()  # noqa: SLF001 - the number of the backward() under way
        if backward != self._backward:
            self._backward, self._reached = backward, set()
        alone = not self._reached - {number}
        self._reached.add(number)
        if not alone and self._given is None:
            self._meter.doubt_step(Reason.SEVERAL_PASSES)
        return alone

    def _begin(self, num_samples: float | None, *, training: bool = True) -> None:
        if num_samples is not None:
            weight = num_samples if self._summed else None
            self._meter.begin_forward(num_samples=num_samples, weight=weight, training=training)

    def _num_samples(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        try:
            if not self._time_first_refused and not any(isinstance(arg, PackedSequence) for arg in args):
                refuse_time_first(self._model)
                self._time_first_refused = True
            return batch_size(self._given, args, kwargs)
        except ObservationError:
            if module.training:
                raise
            return None  # an evaluation may be called in other ways; where it is trained on, the next check tells


class _OutsideOfGraphs:
    """A hook that is kept out of compiled graphs, and out of copies of the model that it is on.

    Where the model is compiled in place, its hooks are inside. Elsewhere the way round dynamo would cost 20 µs a call
    for nothing. A copy (an average of the weights, a teacher, a saved model) is not what the meter measures, and a
    meter's process group cannot be copied: in its place stands what accepts any arguments and does nothing.
    """

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook
        self._outside = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any) -> None:  # noqa: ANN401 - those of torch's hooks
        (self._outside if torch.compiler.is_dynamo_compiling() else self._hook)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # of the standard library, so a saved model needs no dptrain


_MOST = 10_000
"""Objects that an output is looked into for: one that refers to half of the program must not hold up the step."""


def _tensors(output: object) -> Iterator[Tensor]:
    """Walk through an output, each tensor once: collections, and the attributes of any object (a distribution)."""
    waiting, seen = deque([output]), {id(output)}
    while waiting and len(seen) <= _MOST:
        value = waiting.popleft()
        if isinstance(value, Tensor):
            yield value
            continue
        items = [item for item in _held(value) if not isinstance(item, (str, int, float)) and id(item) not in seen]
        seen.update(map(id, items))
        waiting.extend(items)


def _held(value: object) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (tuple, list, deque, set, frozenset)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return () if isinstance(value, (type, nn.Module)) else list(getattr(value, "__dict__", {}).values())
