"""Does a step of the trainer make the host wait, and do its CUDA events pile up?"""

from __future__ import annotations

import gc
import tempfile
from collections import Counter

import torch

from benchmarks.gpu.host_syncs import counted
from benchmarks.gpu.models import Windows, made_tokens, sizes, task_of
from benchmarks.gpu.rows import ON_GPU, Report
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, TrainConfig, Trainer

_FIRST, _LAST = 20, 30
_STEPS = 200 if ON_GPU else 32


def measure(report: Report) -> None:
    """Count waits over steps 20–30, with every step measured, and live events after 20 and after 200 steps."""
    size = next(iter(sizes(on_gpu=ON_GPU).values()))
    data = Windows(
        made_tokens(vocab_size=size.config.vocab_size, num_tokens=200 * size.config.context),
        context=size.config.context,
    )
    batch = size.micro_batch_size * size.accumulation_steps
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            run_dir=f"{folder}/run",
            max_steps=_STEPS,
            global_batch_size=batch,
            precision="bf16",
            control=ControlConfig(law="constant"),
            noise=NoiseConfig(every=1),
            checkpoint=CheckpointConfig(every_samples=1_000_000),
            log=LogConfig(tracker="none", every_steps=1000, print_every_steps=1000),
        )
        steps = Trainer(config, task=task_of(size, data)).steps()
        for _ in range(_FIRST):
            next(steps)
        events = _live_events()
        with counted() as places:
            for _ in range(_FIRST, _LAST):
                next(steps)
        common = ", ".join(f"{place} ×{count}" for place, count in Counter(places).most_common(4))
        per_step = len(places) / (_LAST - _FIRST)
        what = "host synchronisations per step" if ON_GPU else "calls per step that would wait on a GPU"
        figures = {"host_syncs_per_step": per_step} if ON_GPU else {}
        report.add("steps 20–30", ok=not places, result=f"{per_step:g} {what} {common}", figures=figures)
        for _ in range(_LAST, _STEPS - 1):
            next(steps)
        after = _live_events()
        steps.close()
    report.add(
        f"live CUDA events, step {_FIRST} → {_STEPS - 1}",
        ok=after <= max(2 * events, events + 64),
        result=f"{events} → {after}",
        figures={"live_events": after},
    )


def _live_events() -> int:
    if ON_GPU:
        torch.cuda.synchronize()
    gc.collect()
    return sum(isinstance(found, torch.cuda.Event) for found in gc.get_objects())
