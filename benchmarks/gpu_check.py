"""Does the meter work on a GPU?"""
# bash benchmarks/gpu_check.sh FOLDER; on a machine without a GPU it goes as far as it can and says so

from __future__ import annotations

import functools
import importlib.util
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import dptrain
from benchmarks.problems import Problem, linear, quadratic
from benchmarks.variants import Case, Limits, measure_arms
from dptrain.noise import SmoothedMoments, smoothed

Row = dict[str, Any]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOT_RUN = "**not run on a GPU**"

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
            scale = self._scaler.get_scale if self._scaler.is_enabled() else None
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


def check_wrappers() -> Iterator[Row]:
    """Each wrapper: the first step's moments against plain gradients, and the parameters with and without a meter."""
    data = _data()
    truth = _reference(data[0])
    for name, setting in SETTINGS.items():
        yield _guarded(name, functools.partial(_check_wrapper, setting, data=data, truth=truth))


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
    row: Row = {"method": with_meter.meter.method, "identical": identical}
    if first is None:
        # One replica is one small batch there: nothing to compare, which the meter must notice.
        return row | {
            "ok": identical and with_meter.meter.state().steps_dropped == _STEPS,
            "result": "dropped, as it must",
        }
    error = max(abs(a / b - 1) for a, b in zip((first.grad_sq_norm, first.noise_trace), truth, strict=True))
    bound = _EXACT if setting.precision == "fp32" else _ROUNDED
    return row | {"error": error, "ok": identical and error <= bound, "result": f"off by {error:.1e}"}


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


def check_accuracy() -> Iterator[Row]:
    """Problems whose noise is known, in one process with accumulation."""
    for make in (linear, quadratic):
        yield _guarded(make.__name__, functools.partial(_check_accuracy, make))


def _check_accuracy(make: Callable[[], Problem], *, num_steps: int = 1000, accumulation_steps: int = 4) -> Row:
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
        "result": ", ".join(f"{name} off by {errors[name][0]:+.2%} (chance {chances[name]:.2%})" for name in errors),
        "interval": _interval(meter),
        "errors": {name: error for name, (error, *_) in errors.items()},
        "chances": chances,
    }


def _moments(meter: dptrain.Meter) -> SmoothedMoments:
    """Read the pair without its interval, which would need scipy."""
    found = smoothed(meter.state().sums)
    if found is None:
        raise RuntimeError("the meter measured nothing: each step was dropped")
    return found


def _interval(meter: dptrain.Meter) -> str:
    return str(meter.read()) if importlib.util.find_spec("scipy") else "not read: scipy is not installed"


_LIGHT = Case(parameters="12M", compute="light", num_blocks=6, width=416, num_tokens=64, world_size=1)
GPU_CASES = (
    _LIGHT,
    replace(_LIGHT, compute="heavy", num_tokens=512, num_samples=16),
    replace(_LIGHT, parameters="50M", compute="heavy", num_blocks=8, width=720, num_tokens=512, num_samples=16),
)
CPU_CASES = (Case(parameters="2M", compute="light", num_blocks=4, width=208, num_tokens=8, world_size=1),)


def check_overhead() -> Iterator[Row]:
    """The arms of `benchmarks.overhead` in a group of one, timed by events in the stream."""
    on_gpu = DEVICE.type == "cuda"
    limits = Limits(seconds=20 if on_gpu else 1, fewest_rounds=2, longest_warm_up=80 if on_gpu else 16)
    for case in GPU_CASES if on_gpu else CPU_CASES:
        try:
            rows = measure_arms(case, device=DEVICE, limits=limits)
        except Exception as error:  # noqa: BLE001 - one failure must not hide the other answers
            yield _failure(case.name, error)
            continue
        for row in rows:
            result = f"{row['shown']} × bare (bare to bare {row['shown_floor']}), every {row['every']}"
            yield row | {
                "check": f"{row['case']}, {row['arm']}",
                "ok": True,
                "result": row["shown"] if "absent" in row else result,
            }


def _guarded(name: str, check: Callable[[], Row]) -> Row:
    try:
        return {"check": name} | check()
    except Exception as error:  # noqa: BLE001 - one failure must not hide the other answers
        return _failure(name, error)
    finally:
        torch.compiler.reset()


def _failure(name: str, error: Exception) -> Row:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"check": name, "ok": False, "result": text, "traceback": traceback.format_exc()}


CHECKS = {"Wrappers": check_wrappers, "Accuracy": check_accuracy, "Overhead": check_overhead}


def main(folder: Path) -> int:
    """Write both pages and return how many checks failed."""
    began_s = time.perf_counter()
    sections: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as store:
        backend = "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}/store", rank=0, world_size=1)
        for title, check in CHECKS.items():
            sections[title] = []
            for row in check():
                sections[title].append(row)
                print(f"{'ok  ' if row['ok'] else 'FAIL'} {title}: {row['check']}: {row['result']}", flush=True)
        dist.destroy_process_group()
    environment = _environment(seconds=time.perf_counter() - began_s)
    record = {"question": __doc__, "environment": environment, "sections": sections}
    (folder / "gpu_check.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "gpu_check.md").write_text(_page(sections, environment=environment), encoding="utf-8")
    return sum(not row["ok"] for rows in sections.values() for row in rows)


def _environment(*, seconds: float) -> dict[str, str | float]:
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "dptrain": dptrain.__version__,
        "seconds": round(seconds),
    }


def _page(sections: dict[str, list[Row]], *, environment: dict[str, str | float]) -> str:
    lines = ["# Does the meter work on a GPU?", ""]
    if DEVICE.type != "cuda":
        lines += [f"{NOT_RUN}: these are the same checks on a CPU, with gloo in place of NCCL.", ""]
    lines += [", ".join(f"{name} {value}" for name, value in environment.items()), ""]
    for title, rows in sections.items():
        lines += [f"## {title}", "", "| check | | result |", "|---|---|---|"]
        lines += [
            f"| {_cell(row['check'])} | {'ok' if row['ok'] else '**FAILED**'} | {_cell(row['result'])} |"
            for row in rows
        ]
        lines.append("")
    lines += [
        (
            "Wrappers: a group of one; |G|² and tr(Σ) of one step of two micro-batches against plain gradients, and "
            "parameters bit-identical after three steps with and without the meter. Accuracy: one process, four "
            "micro-batches a step, 1000 steps. Overhead: median over rounds, arms in turns; in a group of one "
            "nothing travels, so that a step is shorter than between replicas and measuring a larger share of it."
        ),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1])), 1))
