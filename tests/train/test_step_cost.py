"""What a step must not do: wait for the device, grow, or do again what was done before."""

from __future__ import annotations

import gc
import os
import resource

import psutil

from benchmarks.gpu.host_syncs import counted
from dptrain.runtime.step_timer import StepTimer
from dptrain.tasks.digits import digits
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

NEVER = 10**9


def tiny(folder, **settings):
    given = {
        "control": ControlConfig(law="constant"),
        "noise": NoiseConfig(every=1),
        "log": LogConfig(tracker="none", every_steps=NEVER, print_every_steps=NEVER, eval_every_samples=NEVER),
        **settings,
    }
    return TrainConfig(
        run_dir=str(folder / "run"),
        max_samples=NEVER,
        global_batch_size=4,
        micro_batch_size=2,
        device="cpu",
        optimizer=OptimizerConfig(schedule="constant", warmup_samples=0),
        checkpoint=CheckpointConfig(every_samples=NEVER),
        **given,
    )


def softmax():
    return digits(model="softmax")


def test_a_step_reads_no_value_of_a_tensor(tmp_path):
    """Between two rows of the log no call that would wait for a GPU: neither a read, nor a tensor of host numbers."""
    steps = Trainer(tiny(tmp_path), task=softmax).steps()
    for _ in range(5):
        next(steps)
    with counted() as places:
        for _ in range(20):
            next(steps)
    steps.close()
    assert places == []


def test_a_constant_batch_fits_no_step_times(tmp_path, monkeypatch):
    """Nobody asks how long other batches would take, so nothing is fitted."""
    asked = []
    model = StepTimer.model.fget
    monkeypatch.setattr(StepTimer, "model", property(lambda timer: asked.append(1) or model(timer)))
    steps = Trainer(tiny(tmp_path, control=ControlConfig(mode="off")), task=softmax).steps()
    for _ in range(30):
        next(steps)
    steps.close()
    assert asked == []


def test_many_tiny_steps_are_flat(tmp_path):
    """Over 3,000 steps memory, descriptors and objects stay as they are after the first 1,000.

    `benchmarks.flat` takes 20,000.
    """
    steps = Trainer(tiny(tmp_path, execution=ExecutionConfig(collect_garbage_every_steps=500)), task=softmax).steps()
    for _ in range(1000):
        next(steps)
    before = _used()
    for _ in range(2000):
        next(steps)
    after = _used()
    steps.close()
    assert after["descriptors"] <= before["descriptors"]
    assert after["objects"] <= before["objects"] + 500
    assert after["bytes"] <= before["bytes"] + 8 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def _used():
    gc.collect()
    process = psutil.Process(os.getpid())
    return {
        "descriptors": process.num_fds(),
        "objects": len(gc.get_objects()),
        "bytes": process.memory_info().rss,
    }
