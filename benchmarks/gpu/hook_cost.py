"""What does measuring every step cost by the number of parameters?"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import dptrain
from benchmarks.gpu.rows import DEVICE, ON_GPU, Report

_COUNTS = (75, 300, 1200) if ON_GPU else (75, 300)
_WIDTH = 512 if ON_GPU else 32
_ROUNDS = 30 if ON_GPU else 5


def measure(report: Report) -> None:
    """Time a step of as many square layers, bare and with every step measured, in turns."""
    for count in _COUNTS:
        model = nn.Sequential(*[nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(count)]).to(DEVICE)
        samples = torch.randn(64, _WIDTH, device=DEVICE)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * (_ROUNDS + 3)):
            measured = turn % 2 == 1
            taken = _step_s(model, samples, measured=measured)
            if turn >= 6:
                seconds[measured].append(taken)
        bare, with_meter = (statistics.median(seconds[key]) for key in (False, True))
        per_parameter_us = 1e6 * (with_meter - bare) / count
        report.add(
            f"{count} parameters",
            ok=True,
            result=f"{1e3 * bare:.2f} ms bare, {1e3 * with_meter:.2f} ms measured: {per_parameter_us:.1f} µs each",
            figures={f"every_step_ratio_{count}": with_meter / bare},
        )


def _step_s(model: nn.Module, samples: torch.Tensor, *, measured: bool) -> float:
    meter = dptrain.attach(model, every=1) if measured else None
    _wait()
    began_s = time.perf_counter()
    for micro_batch in samples.chunk(2):
        (model(micro_batch).square().mean() / 2).backward()
    if meter is not None:
        meter.step()
    model.zero_grad()
    _wait()
    taken_s = time.perf_counter() - began_s
    if meter is not None:
        meter.remove()
    return taken_s


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
