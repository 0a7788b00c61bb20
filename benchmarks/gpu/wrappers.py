"""Is the meter right on this device in every wrapper, and does it leave the parameters as they are?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import dptrain
from benchmarks.accuracy.problems import Problem, linear, quadratic
from benchmarks.gpu.rows import DEVICE, Report, Row
from dptrain.noise import SmoothedMoments, smoothed

_STEPS = 3
_MICRO_BATCHES = 2
_MICRO_BATCH_SIZE = 8
_EXACT, _ROUNDED = 1e-3, 0.1
"""Relative error that single precision, and precision of 8 or 11 bits, leave of |G|² and tr(Σ)."""
_WIDE = 4.5
"""Standard errors that chance does not leave between an estimate and the truth."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to train.

    Attributes:
        wrap: model → what the loop calls.
        precision: "fp32", "bf16" for autocast, or "fp16" for autocast with a GradScaler.
        method: of `attach`.
    """

    wrap: Callable[[nn.Module], nn.Module]
    precision: str = "fp32"
    method: str = "auto"


def _plain(model: nn.Module) -> nn.Module:
    return model


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.children():
        fully_shard(block)
    sharded: Any = fully_shard(model)
    return cast("nn.Module", sharded)


def _replicated(model: nn.Module) -> nn.Module:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    replicated: Any = replicate(model)
    return cast("nn.Module", replicated)


def _compiled(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def compiled(model: nn.Module) -> nn.Module:
        whole: Any = torch.compile(wrap(model))
        return cast("nn.Module", whole)

    return compiled


def _compiled_blocks(model: nn.Module) -> nn.Module:
    for block in model.children():
        block.compile()
    return _sharded(model)


SETTINGS = {
    "one process": Setting(wrap=_plain),
    "DDP": Setting(wrap=_ddp),
    "DDP, hook": Setting(wrap=_ddp, method="hook"),
    "fully_shard": Setting(wrap=_sharded),
    "replicate": Setting(wrap=_replicated),
    "one process, bf16": Setting(wrap=_plain, precision="bf16"),
    "DDP, bf16": Setting(wrap=_ddp, precision="bf16"),
    "fully_shard, bf16": Setting(wrap=_sharded, precision="bf16"),
    "one process, fp16 with GradScaler": Setting(wrap=_plain, precision="fp16"),
    "DDP, fp16 with GradScaler": Setting(wrap=_ddp, precision="fp16"),
    "one process, compiled": Setting(wrap=_compiled(_plain)),
    "DDP, compiled": Setting(wrap=_compiled(_ddp)),
    "fully_shard, blocks compiled": Setting(wrap=_compiled_blocks),
}


class Loop:
    """A training loop of few steps, with the meter or without."""

    def __init__(self, setting: Setting, *, measured: bool) -> None:
        torch.manual_seed(0)
        self.model = setting.wrap(_network())
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self._dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[setting.precision]
        self._scaler = torch.amp.GradScaler(DEVICE.type, enabled=setting.precision == "fp16")
        self.meter: dptrain.Meter | None = None
        if measured:
            scale = self._scaler if self._scaler.is_enabled() else None
            self.meter = dptrain.attach(self.model, method=setting.method, every=1, loss_scale=scale)  # type: ignore[arg-type]

    def step(self, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        """Take one optimizer step."""
        for number, (pixels, classes) in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with _waits(self.model) if not last else nullcontext():
                with torch.autocast(DEVICE.type, dtype=self._dtype, enabled=self._dtype is not None):
                    loss = functional.cross_entropy(self.model(pixels), classes) / len(micro_batches)
                self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self.meter is not None:
            self.meter.step()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        """Return the parameters, whole."""
        return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in self.model.parameters()]


def _waits(model: nn.Module) -> AbstractContextManager[None]:
    inner = getattr(model, "_orig_mod", model)
    return inner.no_sync() if isinstance(inner, DistributedDataParallel) else nullcontext()


def _network() -> nn.Sequential:
    hidden = [nn.Sequential(nn.Linear(width, 256), nn.GELU()) for width in (64, 256, 256)]
    return nn.Sequential(*hidden, nn.Linear(256, 10)).to(DEVICE)


def _data() -> list[list[tuple[Tensor, Tensor]]]:
    """Return the micro-batches of each step."""
    generator = torch.Generator().manual_seed(1)
    shape = (_STEPS, _MICRO_BATCHES, _MICRO_BATCH_SIZE)
    pixels = torch.randn((*shape, 64), generator=generator).to(DEVICE)
    classes = torch.randint(0, 10, shape, generator=generator).to(DEVICE)
    return [list(zip(*step, strict=True)) for step in zip(pixels, classes, strict=True)]


def measure(report: Report) -> None:
    """The first step's moments against plain gradients; parameters with and without a meter; known answers."""
    data = _data()
    truth = _reference(data[0])
    for name, setting in SETTINGS.items():
        report.guarded(name, functools.partial(_check_wrapper, setting, data=data, truth=truth))
    for make in (linear, quadratic):
        report.guarded(f"known answer: {make.__name__}", functools.partial(_check_accuracy, make))


def _check_wrapper(setting: Setting, *, data: list[list[tuple[Tensor, Tensor]]], truth: tuple[float, float]) -> Row:
    with_meter, without = Loop(setting, measured=True), Loop(setting, measured=False)
    assert with_meter.meter is not None
    with_meter.step(data[0])
    first = None if setting.method == "hook" else _moments(with_meter.meter)
    without.step(data[0])
    for micro_batches in data[1:]:
        with_meter.step(micro_batches)
        without.step(micro_batches)
    identical = all(map(torch.equal, with_meter.weights(), without.weights()))
    if first is None:
        # One replica is one small batch there: nothing to compare, which the meter must notice.
        dropped = with_meter.meter.state().steps_dropped == _STEPS
        return _verdict(identical and dropped, "one replica is one small batch: dropped" if dropped else "not dropped")
    error = max(abs(a / b - 1) for a, b in zip((first.grad_sq_norm, first.noise_trace), truth, strict=True))
    bound = _EXACT if setting.precision == "fp32" else _ROUNDED
    same = "parameters identical" if identical else "PARAMETERS DIFFER"
    return _verdict(identical and error <= bound, f"error {error:.1e} (allowed {bound:g}), {same}")


def _verdict(ok: bool, result: str) -> Row:  # noqa: FBT001 - the row's own fields
    return {"ok": ok, "result": result, "figures": {"right": float(ok)}}


def _reference(micro_batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Return the unbiased |G|² and tr(Σ) of one step from gradients of the bare model."""
    torch.manual_seed(0)
    model = _network()
    gradients = []
    for pixels, classes in micro_batches:
        loss = functional.cross_entropy(model(pixels), classes)
        parts = torch.autograd.grad(loss, list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    single = torch.stack(gradients)
    big = single.mean(0).square().sum().item()
    small = single.square().sum(1).mean().item()
    num = len(single)
    noise = (small - big) * num / (num - 1)
    return big - noise / num, noise * _MICRO_BATCH_SIZE


def _check_accuracy(make: Callable[[], Problem], *, num_steps: int = 400, accumulation_steps: int = 4) -> Row:
    with torch.device(DEVICE):
        problem = make()
        size = problem.micro_batch_size
        samples = problem.draw(torch.Generator(DEVICE).manual_seed(2), (num_steps, accumulation_steps, size))
    with dptrain.attach(problem.model, every=1, micro_batch_size=size) as meter:
        for step in samples:
            for micro_batch in step:
                (problem.model(micro_batch).mean() / accumulation_steps).backward()
            meter.step()
            problem.model.zero_grad()
        found = _moments(meter)
    errors = {
        "|G|²": (found.grad_sq_norm / problem.truth.grad_sq_norm - 1, found.var_grad, problem.truth.grad_sq_norm),
        "tr(Σ)": (found.noise_trace / problem.truth.noise_trace - 1, found.var_trace, problem.truth.noise_trace),
    }
    chances = {name: math.sqrt(variance) / true for name, (_, variance, true) in errors.items()}
    return {
        "ok": all(abs(errors[name][0]) <= _WIDE * chances[name] for name in errors),
        "result": ", ".join(f"{name} error {errors[name][0]:+.2%} (chance {chances[name]:.2%})" for name in errors),
    }


def _moments(meter: dptrain.Meter) -> SmoothedMoments:
    """Read the pair without its interval, which would need scipy."""
    found = smoothed(meter.state().sums)
    if found is None:
        raise RuntimeError("the meter measured nothing: each step was dropped")
    return found
