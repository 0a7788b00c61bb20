"""Does a whole run hold on this device: resume, memory, evaluation, columns, compiled graphs, an adaptive batch?"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import Size, Tokens, Windows, byte_tokens, made_tokens, sizes, task_of
from benchmarks.gpu.rows import ON_GPU, Report, Row
from dptrain.models.gpt import SIZES
from dptrain.tracking.jsonl import read_rows
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

_COMPILED = ExecutionConfig(compile="model", compile_backend="inductor" if ON_GPU else "aot_eager")
_QUIET = LogConfig(tracker="none", print_every_steps=10**6)


def measure(report: Report) -> None:
    """Run small runs to their end and look at what they left."""
    size = next(iter(sizes(on_gpu=ON_GPU).values()))
    size = replace(size, micro_batch_size=min(size.micro_batch_size, 8), accumulation_steps=2)
    tokens = made_tokens(vocab_size=size.config.vocab_size, num_tokens=400 * size.config.context)
    checks: dict[str, Callable[[Size, Any, Path], Row]] = {
        "resume gives the same bits": _resume,
        "graphs of a compiled task": _graphs,
        "columns": _columns,
        "auto micro-batch, then an evaluation": _auto,
        "out of memory halves the micro-batch": _out_of_memory,
    }
    for name, check in checks.items():
        with tempfile.TemporaryDirectory() as folder:
            report.guarded(name, lambda check=check, folder=folder: check(size, tokens, Path(folder)))  # type: ignore[misc]


def _config(size: Size, run_dir: Path, **settings: Any) -> TrainConfig:  # noqa: ANN401 - as TrainConfig
    batch = size.micro_batch_size * size.accumulation_steps
    given = {
        "global_batch_size": batch,
        "max_samples": 12 * batch,
        "precision": "bf16",
        "control": ControlConfig(law="constant"),
        "noise": NoiseConfig(every=1),
        "checkpoint": CheckpointConfig(every_samples=10**9),
        "log": _QUIET,
        **settings,
    }
    return TrainConfig(run_dir=str(run_dir), **given)


def _train(
    config: TrainConfig, size: Size, tokens: Tokens, *, resume: bool = False, stop_at: int | None = None
) -> Trainer:
    windows = Windows(tokens, context=size.config.context)
    trainer = Trainer(config, task=task_of(size, windows, eval_data=windows), resume=resume)
    with contextlib.redirect_stdout(io.StringIO()):
        for record in trainer.steps():
            if record.step == stop_at:
                break
    return trainer


def _resume(size: Size, tokens: Tokens, folder: Path) -> Row:
    batch = size.micro_batch_size * size.accumulation_steps
    settings = {"checkpoint": CheckpointConfig(every_samples=5 * batch)}
    straight = _train(_config(size, folder / "straight", **settings), size, tokens)
    config = _config(size, folder / "cut", **settings)
    _train(config, size, tokens, stop_at=8)
    resumed = _train(config, size, tokens, resume=True)
    same = _digest(straight) == _digest(resumed)
    return {"ok": same, "result": "parameters identical" if same else "PARAMETERS DIFFER"}


def _digest(trainer: Trainer) -> str:
    newest = max((trainer.run_dir / "checkpoints").glob("step-*"))
    return hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest()


def _graphs(size: Size, tokens: Tokens, folder: Path) -> Row:
    from torch._dynamo.utils import counters

    counters.clear()
    batch = size.micro_batch_size
    schedule = f"0:{2 * batch} {4 * batch}:{4 * batch} {12 * batch}:{2 * batch}"
    config = _config(
        size,
        folder / "run",
        execution=_COMPILED,
        global_batch_size=None,
        micro_batch_size=batch,
        max_samples=24 * batch,
        control=ControlConfig(law="schedule", schedule=schedule),
    )
    before = time.perf_counter()
    _train(config, size, tokens)
    graphs = counters["stats"]["unique_graphs"]
    ok = 0 < graphs <= 3
    seconds = time.perf_counter() - before
    return {"ok": ok, "result": f"{graphs} graphs while accumulation went 2 → 4 → 2, {seconds:.0f} s"}


def _columns(size: Size, tokens: Tokens, folder: Path) -> Row:
    trainer = _train(_config(size, folder / "run"), size, tokens)
    row = [row for row in read_rows(trainer.run_dir / "metrics.jsonl") if row["kind"] == "train"][-1]
    mfu, energy = row.get("ledger/mfu"), row.get("ledger/energy_j")
    ok = bool(mfu and energy) if ON_GPU else mfu is None
    return {"ok": ok, "result": f"mfu {mfu}, energy {energy} J"}


def _auto(size: Size, tokens: Tokens, folder: Path) -> Row:
    config = _config(size, folder / "run", micro_batch_size="auto", global_batch_size=None)
    trainer = _train(replace(config, max_samples=64), size, tokens)
    row = [row for row in read_rows(trainer.run_dir / "metrics.jsonl") if row["kind"] == "train"][-1]
    return {"ok": True, "result": f"micro-batch {row['batch/micro']}, and the evaluation fits"}


def _out_of_memory(size: Size, tokens: Tokens, folder: Path) -> Row:
    if not ON_GPU:
        return {"ok": True, "result": "not run: a host has no such limit"}
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    size = replace(size, micro_batch_size=32)
    _train(_config(size, folder / "a", max_samples=64), size, tokens)
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 0.75 * peak / total))
    try:
        trainer = _train(_config(size, folder / "b", max_samples=64 * 4), size, tokens)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    micro = [
        int(row["batch/micro"] or 0) for row in read_rows(trainer.run_dir / "metrics.jsonl") if row["kind"] == "train"
    ]
    return {"ok": micro[-1] < micro[0], "result": f"micro-batch {micro[0]} → {micro[-1]}"}


def adapt(report: Report, *, seconds: float = 120.0 if ON_GPU else 8.0) -> None:
    """Run the default adaptive trainer on bytes for so long: does the batch move, is φ resolved?"""
    root = Path(torch.__file__).parent if ON_GPU else Path(__file__).parents[1]
    tokens = byte_tokens(root)
    size = next(iter(sizes(on_gpu=ON_GPU).values()))
    config = replace(SIZES["124m"], vocab_size=256, context=512, tied=False) if ON_GPU else size.config
    size = replace(size, config=config, micro_batch_size=32 if ON_GPU else 2, accumulation_steps=2)
    report.guarded("default settings", lambda: _adapt(size, tokens, seconds=seconds))


def _adapt(size: Size, tokens: Tokens, *, seconds: float) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            run_dir=f"{folder}/run",
            max_samples=40_000,
            precision="bf16",
            execution=_COMPILED if ON_GPU else ExecutionConfig(),
            optimizer=OptimizerConfig(learning_rate=6e-4, warmup_samples=800),
            log=_QUIET,
        )
        trainer = Trainer(config, task=task_of(size, Windows(tokens, context=size.config.context)))
        ends_s = time.perf_counter() + seconds
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in trainer.steps():
                if time.perf_counter() > ends_s:
                    break
        rows = [row for row in read_rows(trainer.run_dir / "metrics.jsonl") if row["kind"] == "train"]
    first, last = rows[0], rows[-1]
    resolved = [row["step"] for row in rows if row.get("noise_scale/state") == "resolved"]
    return {
        "ok": not ON_GPU or bool(resolved),
        "result": (
            f"batch {first['batch/global']} → {last['batch/global']} in {last['step']} steps; noise scale "
            f"{last['noise_scale/value'] or last['noise_scale/state']}, resolved in {len(resolved)} of {len(rows)}; "
            f"loss {first['train/loss']:.3f} → {last['train/loss']:.3f}"
        ),
    }
