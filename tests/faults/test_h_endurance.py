"""H9: a long run with many checkpoints takes no more of anything at its end than at its beginning."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

from dptrain.train import CheckpointConfig
from dptrain.train.step import Stepper
from tests.replicas import run_replicas
from tests.runs import attempt, make_config

STEPS = 1000


def run_for_long(rank, world_size, folder):
    """Train for 1,000 steps with 100 checkpoints, and note at some of them what the process holds."""
    take_step, held = Stepper.step, {}

    def step_and_look(stepper, record, *, report):
        if record.step % 250 == 0:
            process = psutil.Process()
            held[record.step] = (process.memory_info().rss, process.num_fds(), threading.active_count())
        return take_step(stepper, record, report=report)

    Stepper.step = step_and_look
    try:
        config = make_config(
            folder,
            max_samples=16 * STEPS,
            global_batch_size=16,
            checkpoint=CheckpointConfig(every_samples=160, keep=2),
        )
        attempt(folder, config=config)
    finally:
        Stepper.step = take_step
    return held


def test_h9_a_long_run_holds_no_more_at_its_end(tmp_path):
    """After 1,000 steps and 100 checkpoints: memory as at step 250 within 2 %, the same descriptors and threads."""
    held = run_replicas(run_for_long, world_size=1, args=(tmp_path,))[0]
    (early, *of_early), (late, *of_late) = held[250], held[1000]
    assert late < 1.02 * early
    assert of_late == of_early
    checkpoints = list((tmp_path / "checkpoints").iterdir())
    assert len(checkpoints) == 2, "no temporary folder, and as many checkpoints as are kept"
    assert not list(Path(tmp_path).glob("*.new"))
