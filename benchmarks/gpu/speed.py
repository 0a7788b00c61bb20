"""How fast does a GPT train in a hand-written loop, with the meter in it, and in the trainer?"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dptrain
from benchmarks.gpu.models import Size, Tokens, Windows, made_tokens, next_token_loss, sizes, task_of
from benchmarks.gpu.rows import DEVICE, ON_GPU, Report, Row
from dptrain.cost.device_peaks import peak_flops_per_s
from dptrain.models.gpt import Gpt
from dptrain.train import (
    CheckpointConfig,
    ControlConfig,
    ExecutionConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    Trainer,
)

HAND, DEFAULT, EVERY_STEP, OFF, MEASURING = (
    "hand-written loop",
    "with attach, default",
    "with attach, every=1",
    "trainer, off",
    "trainer, measuring",
)
_VARIANTS = {"124m": (HAND, DEFAULT, EVERY_STEP, OFF, MEASURING), "tiny": (HAND, DEFAULT, EVERY_STEP, OFF, MEASURING)}
_TWO_VARIANTS = (HAND, MEASURING)
_CHUNK = 4
"""Steps of a variant in a turn: one step alone would be timed with the caches of another."""
_SETTLE = 40 if ON_GPU else 12
_GOALS = {"124m": 0.45}
_COMPILE = ON_GPU


def measure(report: Report, *, seconds: float = 60.0 if ON_GPU else 4.0) -> None:
    """Time every size, variants in turns."""
    for size in sizes(on_gpu=ON_GPU).values():
        report.guarded(f"{size.name}: speed", functools.partial(_measure_size, report, size, seconds=seconds))
        if ON_GPU:
            torch.cuda.empty_cache()


def _measure_size(report: Report, size: Size, *, seconds: float) -> Row:
    names = _VARIANTS.get(size.name, _TWO_VARIANTS)
    tokens = made_tokens(vocab_size=size.config.vocab_size, num_tokens=4 * size.tokens_per_step)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        every = _settled_interval(size, tokens)
        variants = {name: _variant(name, size, tokens, folder=Path(folder), every=every, stack=stack) for name in names}
        times = _timed(variants, seconds=seconds)
        launches = {name: _launches(step) for name, step in variants.items()} if ON_GPU else {}
    medians = {name: statistics.median(found) for name, found in times.items()}
    for name in names:
        ratio = medians[name] / medians[HAND]
        speed = size.tokens_per_step / medians[name]
        more = f", {launches[name]}" if name in launches else ""
        text = f"{speed:,.0f} tokens/s, {_mfu_text(size, medians[name])}, {ratio:.4f} × hand-written{more}"
        report.add(f"{size.name}: {name}", ok=True, result=text)
    return _verdict(size, medians, every=every)


def _verdict(size: Size, medians: dict[str, float], *, every: int) -> Row:
    mfu = _mfu(size, medians[MEASURING])
    goal = _GOALS.get(size.name)
    figures = {f"tokens_per_s_{size.name}": size.tokens_per_step / medians[MEASURING]}
    figures |= {} if mfu is None else {f"mfu_{size.name.replace('.', '_')}": mfu}
    ratio = medians[HAND] / medians[MEASURING]
    figures[f"trainer_over_handwritten_{size.name}"] = ratio
    if size.name in ("124m", "tiny"):
        figures["meter_default_ratio"] = medians[DEFAULT] / medians[HAND]
        figures["meter_every_step_ratio"] = medians[EVERY_STEP] / medians[HAND]
    ok = goal is None or mfu is None or mfu >= goal
    return {
        "ok": ok,
        "result": f"trainer at {ratio:.3f} of the hand-written loop's speed, measured every {every} steps",
        "figures": figures,
    }


def _variant(
    name: str, size: Size, tokens: Tokens, *, folder: Path, every: int, stack: contextlib.ExitStack
) -> Callable[[], object]:
    """Return a function that takes one optimizer step."""
    if name in (OFF, MEASURING):
        steps = _trainer(size, tokens, run_dir=folder / name.replace(" ", "-"), off=name == OFF, every=every).steps()
        stack.callback(steps.close)
        return lambda: next(steps)
    loop = HandWritten(size, tokens)
    if name == DEFAULT:
        loop.meter = dptrain.attach(loop.model, every=every)
    elif name == EVERY_STEP:
        loop.meter = dptrain.attach(loop.model, every=1)
    return loop.step


class HandWritten:
    """A loop as in nanoGPT's train.py: autocast, accumulation, clipping, fused AdamW, one batch ahead.

    Args:
        size: of the model.
        tokens: to draw windows from.
    """

    def __init__(self, size: Size, tokens: Tokens) -> None:
        torch.manual_seed(0)
        self._size = size
        self._tokens = tokens
        self._rng = np.random.default_rng(0)
        self._bare = Gpt(size.config).to(DEVICE)
        matrices = [p for p in self._bare.parameters() if p.dim() > 1]
        vectors = [p for p in self._bare.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
        if _COMPILE:
            self._bare.compile()
        self.model = self._bare
        self.meter: dptrain.Meter | None = None
        self._next = self._batch()

    def _batch(self) -> Tensor:
        context = self._size.config.context
        starts = self._rng.integers(0, len(self._tokens) - context - 1, size=self._size.micro_batch_size)
        rows = torch.stack(
            [torch.from_numpy(self._tokens[start : start + context + 1].astype(np.int64)) for start in starts]
        )
        return rows.pin_memory().to(DEVICE, non_blocking=True) if ON_GPU else rows

    def step(self) -> None:
        """Take one optimizer step."""
        steps = self._size.accumulation_steps
        for _ in range(steps):
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                loss = next_token_loss(self.model, self._next) / steps
            self._next = self._batch()
            loss.backward()  # type: ignore[no-untyped-call]
        if self.meter is not None:
            self.meter.step()
        torch.nn.utils.clip_grad_norm_(self._bare.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _trainer(size: Size, tokens: Tokens, *, run_dir: Path, off: bool, every: int) -> Trainer:
    never = 10**9
    config = TrainConfig(
        run_dir=str(run_dir),
        max_samples=never,
        global_batch_size=size.micro_batch_size * size.accumulation_steps,
        precision="bf16",
        replica_check_every_steps=0,
        execution=ExecutionConfig(compile="model" if _COMPILE else "off"),
        control=ControlConfig(mode="off") if off else ControlConfig(law="constant"),
        noise=NoiseConfig(every=every),
        optimizer=OptimizerConfig(schedule="constant", warmup_samples=0),
        checkpoint=CheckpointConfig(every_samples=never),
        log=LogConfig(tracker="none", every_steps=50, print_every_steps=10**6, eval_every_samples=never),
    )
    return Trainer(config, task=task_of(size, Windows(tokens, context=size.config.context)))


def _settled_interval(size: Size, tokens: Tokens) -> int:
    """Return the interval that the meter chooses in a loop that nothing interrupts."""
    loop = HandWritten(size, tokens)
    with dptrain.attach(loop.model) as meter:
        loop.meter = meter
        for _ in range(_SETTLE):
            loop.step()
        return meter.every


def _timed(variants: dict[str, Callable[[], object]], *, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of a step of each variant, variants in turns."""
    for step in variants.values():  # compilation, allocation, the optimizer's state
        for _ in range(_CHUNK):
            step()
    times: dict[str, list[float]] = {name: [] for name in variants}
    ends_s = time.perf_counter() + seconds
    names = list(variants)
    while time.perf_counter() < ends_s or len(times[names[0]]) < 3:
        names = [*names[1:], names[0]]  # so that none always follows the same
        for name in names:
            times[name].append(_chunk_s(variants[name]) / _CHUNK)
    return times


def _chunk_s(step: Callable[[], object]) -> float:
    _wait()
    began_s = time.perf_counter()
    for _ in range(_CHUNK):
        step()
    _wait()
    return time.perf_counter() - began_s


def _launches(step: Callable[[], object]) -> str:
    """Return kernel launches of a step and the share of it in which the GPU idles, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    _wait()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        began_s = time.perf_counter()
        step()
        _wait()
        wall_us = 1e6 * (time.perf_counter() - began_s)
    spans = sorted(_spans(found))
    busy_us, end = 0.0, 0.0
    for first, last in spans:
        busy_us += max(0.0, last - max(first, end))
        end = max(end, last)
    return f"{len(spans)} launches, idle {max(0.0, 1 - busy_us / wall_us):.1%}"


def _spans(found: object) -> Iterator[tuple[float, float]]:
    for event in found.events():  # type: ignore[attr-defined] # the profiler's own list
        if str(event.device_type).endswith("CUDA"):
            yield event.time_range.start, event.time_range.end


def _mfu(size: Size, step_s: float) -> float | None:
    """Return the share of the peak: 6 FLOPs per parameter and token, and attention in full (PaLM, appendix B)."""
    peak = peak_flops_per_s(torch.cuda.get_device_name(), precision="bfloat16") if ON_GPU else None
    if peak is None:
        return None
    config = size.config
    with torch.device("meta"):
        num_parameters = Gpt(config).num_parameters()
    flops_per_token = 6 * num_parameters + 12 * config.depth * config.width * config.context
    return flops_per_token * size.tokens_per_step / step_s / peak


def _mfu_text(size: Size, step_s: float) -> str:
    mfu = _mfu(size, step_s)
    return "MFU not known" if mfu is None else f"MFU {mfu:.1%}"


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
