"""AdaptDL's own estimator, goodput model and rate rule, at work in dptrain's loop; none of it is copied here."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.overhead.peers import _module

_FIRST_FIT_STEPS = 30
_FITS_APART = 1.5
_SPEEDUP_THRESHOLD = 1.05
"""As in its data loader: a smaller gain is not worth a change."""


def absent() -> str:
    """Return why AdaptDL cannot be used; empty where it can."""
    try:
        _goodput()
        _module("adaptdl", "adaptdl/torch/gradient_noise_scale.py")
    except Exception as error:  # noqa: BLE001 - whatever it is, the page names it
        return f"{type(error).__name__}: {error}"
    return ""


def _goodput() -> ModuleType:
    """Import AdaptDL's goodput; without the package `autograd` its fit takes differences for derivatives."""
    try:
        import autograd  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except ImportError:
        module = ModuleType("autograd")
        module.numpy = np  # type: ignore[attr-defined]
        module.grad = _differences  # type: ignore[attr-defined]
        sys.modules["autograd"], sys.modules["autograd.numpy"] = module, np
    return _module("adaptdl", "adaptdl/goodput.py")


def _differences(function: Any) -> Any:  # noqa: ANN401 - autograd's own signature
    from scipy.optimize import approx_fprime

    return lambda params, *arguments: approx_fprime(params, function, 1e-7, *arguments)


class AdaptdlPolicy:
    """Decides on batch and rate as AdaptDL does, from what its own estimator sees.

    AdaptDL decides once an epoch, with step times fitted every 30 seconds, on arbitrary batches from the first one on
    upwards. Here it does so after 30 steps and whenever the number of steps has grown by half, which is sooner, and on
    batches that are the first one times a power of two. Its fit is not counted as time.

    Args:
        model: wrapped by DDP.
        optimizer: over its parameters.
        first_batch: in samples, all replicas together.
        largest_batch: in samples.
        largest_micro_batch: in samples, on one replica.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, *, first_batch: int, largest_batch: int, largest_micro_batch: int
    ) -> None:
        self._first, self._largest, self._largest_micro = first_batch, largest_batch, largest_micro_batch
        self._power = 0.5 if isinstance(optimizer, AdamW) else 1.0
        self._passes = 1
        self._micro = first_batch // dist.get_world_size()
        # AdaptDL sums up passes where this loop has weighed each by its share already: a gradient scale to it.
        scaler = SimpleNamespace(get_scale=lambda: 1.0 / self._passes)
        self._noise = _timed_estimator()(model, optimizer, mp_scaler=scaler)
        # Called with set_to_none at the end of each step, which is where AdaptDL forgets the step as well.
        optimizer.zero_grad = lambda set_to_none=True: self._noise.reset_accumulation()  # type: ignore[method-assign]  # noqa: ARG005
        self._times: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._num_steps, self._next_fit = 0, _FIRST_FIT_STEPS
        self._began_s: float | None = None
        self._fitted: Any = None

    def prepare(self, *, micro_batch_size: int, passes: int) -> None:
        """Note the layout of the step that begins."""
        world_size = dist.get_world_size()
        self._passes, self._micro = passes, micro_batch_size
        self._noise.set_accum_scale(micro_batch_size * world_size / self._first)
        self._noise.pass_ends_s.clear()
        self._began_s = time.perf_counter()

    def learn(self) -> None:
        """Take the times of the step that has just ended."""
        if self._began_s is None:
            return
        now_s, ends = time.perf_counter(), self._noise.pass_ends_s
        times = self._times[self._micro]
        times["accumulate"] += np.diff([self._began_s, *ends])[: self._passes - 1].tolist()
        last_s = now_s - (ends[self._passes - 2] if self._passes > 1 else self._began_s)
        times["optimize"].append(last_s)
        times["accumulate"].append(max(last_s - self._noise.sync_s, 1e-6))
        self._num_steps += 1

    @property
    def is_due(self) -> bool:
        """Whether it is time to decide."""
        return self._num_steps >= self._next_fit

    def batch(self, present: int) -> int:
        """Fit and decide on rank 0; the others follow. A collective."""
        self._next_fit = math.ceil(self._num_steps * _FITS_APART)
        wanted = torch.tensor([self._wanted(present) if dist.get_rank() == 0 else 0])
        dist.broadcast(wanted, src=0)
        return int(wanted)

    def _wanted(self, present: int) -> int:
        goodput, world_size = _goodput(), dist.get_world_size()
        micros = np.array(list(self._times))
        ones = np.ones(len(micros), dtype=int)
        # Means, as AdaptDL takes them, but without the first steps of a shape.
        accumulate, optimize = (
            np.array([np.mean(times[name][3:] or times[name]) for times in self._times.values()])
            for name in ("accumulate", "optimize")
        )
        perf = goodput.fit_perf_params(ones, world_size * ones, micros, accumulate, optimize)
        function = goodput.GoodputFunction(perf, (self._noise.sqr_avg(), self._noise.var_avg()), self._first)
        bounds = (1, self._largest_micro)
        best, atomic, more = function.optimize(
            1, world_size, max_batch_size=self._largest, atomic_bsz_range=bounds, accumulation=True
        )
        if best / max(function(1, world_size, self._micro, self._passes - 1), 1e-8) <= _SPEEDUP_THRESHOLD:
            return present
        doublings = round(math.log2(world_size * atomic * (more + 1) / self._first))
        wanted: int = min(self._first * 2 ** max(doublings, 0), self._largest)
        return wanted

    def learning_rate_factor(self, batch: int) -> float:
        """Return AdaScale's gain, or its root for Adam, from the whole model's estimate."""
        return float(self._noise.gain(batch / self._first) ** self._power)


def _timed_estimator() -> Any:  # noqa: ANN401 - a class made from a peer's
    """Return AdaptDL's estimator, which also notes when passes end and how long gradients were waited for."""
    estimator = _module("adaptdl", "adaptdl/torch/gradient_noise_scale.py").GradientNoiseScale

    class Timed(estimator):  # type: ignore[misc, valid-type, unused-ignore]
        def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - handed on
            super().__init__(*arguments, **options)
            self.pass_ends_s: list[float] = []
            self.sync_s = self._last_gradient_s = 0.0

        def _backward_hook(self, idx: int, param: Any, grad: Any) -> None:  # noqa: ANN401 - handed on
            super()._backward_hook(idx, param, grad)
            self._last_gradient_s = time.perf_counter()

        def _queue_callback(self) -> None:
            self.pass_ends_s.append(time.perf_counter())
            super()._queue_callback()

        def _final_callback(self) -> None:
            self.sync_s = time.perf_counter() - self._last_gradient_s
            super()._final_callback()

    return Timed
