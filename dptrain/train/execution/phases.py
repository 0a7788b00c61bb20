"""How the time of a step is divided: data, forward, backward, communication, meter, optimizer; for `dptrain bench`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from dptrain.train.step import Stepper

PHASES = ("data", "forward", "backward", "communication", "meter", "optimizer", "other")


_PERIOD = 3


@dataclass(frozen=True, kw_only=True)
class _Step:
    combines: bool
    seconds: float
    spent: dict[str, float]


class Phases:
    """Takes the time of each part of a step, from outside of it: a run that nobody times pays nothing.

    The device is waited for before and after each part, so that a timed step takes longer than one that overlaps them.
    One step in three combines no gradients, and so its backward passes are shorter by what a step waits for others;
    what is hidden behind the backward pass is no part of that. Replicas drift apart by it: nothing may be kept of them.

    Args:
        device: of this replica.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: list[_Step] = []
        self._spent: dict[str, float] = defaultdict(float)
        self._combines = True
        self._can_separate = False
        self._name = ""
        self.flops_per_sample: float | None = None

    def attach(self, stepper: Stepper) -> Stepper:
        """Have a stepper's parts timed; returns it."""
        made: Any = stepper
        loader, update, meter, model = made._loader, made._update, made._meter, made._model  # noqa: SLF001 - its parts
        loader.window = self._iterated("data", loader.window)
        made._forward = self._timed("forward", made._forward)  # noqa: SLF001 - as above
        made._backpropagate = self._timed("backward", made._backpropagate)  # noqa: SLF001 - as above
        stopwatch = meter._hook.stopwatch  # noqa: SLF001 - as above
        stopwatch.stop = self._within_backward(stopwatch.stop)
        update.grad_norms = self._timed("optimizer", update.grad_norms)
        update.step = self._timed("optimizer", update.step)
        meter.begin = self._timed("meter", meter.begin)
        meter.close_step = self._timed("meter", meter.close_step)
        self._can_separate = isinstance(model, DistributedDataParallel)
        made._deferred = self._deferred(made._deferred)  # noqa: SLF001 - as above
        stepper.take_flops_per_sample = self._noted(stepper.take_flops_per_sample)  # type: ignore[method-assign]
        return stepper

    def step(self, seconds: float) -> None:
        """Close a step that took so long in all."""
        self._steps.append(_Step(combines=self._combines, seconds=seconds, spent=dict(self._spent)))
        self._spent.clear()
        # One in three: measured steps come at even intervals, and would all fall to one side of every other.
        self._combines = not (self._can_separate and len(self._steps) % _PERIOD == _PERIOD - 1)

    def forget(self) -> None:
        """Leave out the steps so far, which warm up."""
        self._steps.clear()

    def shares(self) -> dict[str, float | None]:
        """Return the share of each part in the mean time of a step that combines gradients.

        None for communication where it cannot be told from the backward pass: under FSDP, and with one replica.
        """
        whole = [step for step in self._steps if step.combines]
        alone = [step for step in self._steps if not step.combines]
        seconds = fmean(step.seconds for step in whole)
        found: dict[str, float | None] = {
            name: fmean(step.spent.get(name, 0.0) for step in whole) / seconds
            for name in ("data", "forward", "meter", "optimizer")
        }
        backward, communication = fmean(step.spent["backward"] for step in whole) / seconds, None
        if alone:
            own = min(fmean(step.spent["backward"] for step in alone) / seconds, backward)
            backward, communication = own, backward - own
        found |= {"backward": backward, "communication": communication}
        found["other"] = max(0.0, 1 - sum(share for share in found.values() if share is not None))
        return {name: found[name] for name in PHASES}

    @contextmanager
    def _during(self, name: str) -> Iterator[None]:
        self._wait()
        self._name = name
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self._name = ""
            self._spent[name] += time.perf_counter() - began_s

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever it takes
            with self._during(name):
                return function(*arguments, **named)

        return call

    def _within_backward(self, function: Callable[[Any], None]) -> Callable[[Any], None]:
        """Count what the meter's hooks take in backward passes as the meter's; on a GPU it stays there."""

        def call(began: Any) -> None:  # noqa: ANN401 - seconds or an event
            function(began)
            if self._name == "backward" and isinstance(began, float):
                taken_s = time.perf_counter() - began
                self._spent["meter"] += taken_s
                self._spent["backward"] -= taken_s

        return call

    def _iterated(self, name: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def call(**named: Any) -> Iterator[Any]:  # noqa: ANN401 - whatever it takes
            """Hand on each item, with the time until it is there counted."""
            items = function(**named)
            end = object()
            while True:
                with self._during(name):
                    item = next(items, end)
                if item is end:
                    return
                yield item

        return call

    def _deferred(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*, is_last: bool) -> Any:  # noqa: ANN401 - a context
            return function(is_last=is_last and self._combines)

        return call

    def _noted(self, function: Callable[[], float | None]) -> Callable[[], float | None]:
        def call() -> float | None:
            self.flops_per_sample = function()
            return self.flops_per_sample

        return call
