"""Do 20,000 tiny steps of the trainer leave memory, descriptors and the time of a step as they are?"""
# python -m benchmarks.flat [--json PATH|-] [--quick]

from __future__ import annotations

import contextlib
import gc
import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from dptrain.tasks.digits import digits
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, TrainConfig, Trainer

_NEVER = 10**9
_PARTS = 10


def measure(quick: bool) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Take the steps in ten parts, and look after each."""
    num_steps = 2_000 if quick else 20_000
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = TrainConfig(
            run_dir=str(Path(folder) / "run"),
            max_samples=_NEVER,
            global_batch_size=4,
            micro_batch_size=2,
            device="cpu",
            control=ControlConfig(law="constant"),
            optimizer=OptimizerConfig(schedule="constant", warmup_samples=0),
            checkpoint=CheckpointConfig(every_samples=_NEVER),
            log=LogConfig(tracker="none", print_every_steps=_NEVER, eval_every_samples=_NEVER),
        )
        steps = Trainer(config, task=lambda: digits(model="softmax")).steps()
        for part in range(1, _PARTS + 1):
            began_s = time.process_time()
            for _ in range(num_steps // _PARTS):
                next(steps)
            step_us = 1e6 * (time.process_time() - began_s) / (num_steps // _PARTS)
            rows.append({"steps": part * num_steps // _PARTS, "step_us": step_us, **_used()})
        steps.close()
    first, last = rows[1], rows[-1]
    figures = {name: last[name] / first[name] for name in ("step_us", "mib", "descriptors", "objects")}
    return harness.Findings(
        figures={f"{name}_growth": value for name, value in figures.items()},
        rows=rows,
        columns={
            "steps": "{steps}",
            "CPU µs/step": "{step_us:.0f}",
            "MiB": "{mib:.1f}",
            "descriptors": "{descriptors}",
            "objects": "{objects}",
        },
        note="One replica, every step logged, the meter at its default; growth is the last part over the second.",
    )


def _used() -> dict[str, float]:
    gc.collect()
    process = psutil.Process(os.getpid())
    return {
        "mib": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "objects": len(gc.get_objects()),
    }


if __name__ == "__main__":
    harness.run(measure, question=__doc__, name="flat")
