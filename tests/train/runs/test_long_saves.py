"""When a run waits for its checkpoints: in turns that no collective and no watchdog takes for a hang."""

from __future__ import annotations

from dptrain.checkpoint.async_writer import AsyncWriter
from dptrain.checkpoint.store import load_newest
from dptrain.runtime.rendezvous import collective_timeout_s
from dptrain.runtime.watchdog import Watchdog
from dptrain.train import ControlConfig, Trainer
from tests.replicas import run_replicas
from tests.runs import EVERY, make_config, noisy

TURNS, LENGTH = 4, 2 * EVERY


def train_with_a_slow_disk(rank, world_size, folder):
    """Each save of rank 0 takes so many turns of waiting; return the waits of this rank and its signs of life."""
    waits, beats, left = [], [], [TURNS]
    wait, beat, save = AsyncWriter.wait, Watchdog.beat, AsyncWriter.save

    def slow(writer, *, timeout_s=None):
        waits.append(timeout_s)
        left[0] -= 1
        return wait(writer, timeout_s=timeout_s) and left[0] < 0

    def saved(writer, **given):
        left[0] = TURNS
        return save(writer, **given)

    AsyncWriter.wait, AsyncWriter.save = slow, saved
    Watchdog.beat = lambda watchdog: (beats.append(len(waits)), beat(watchdog))
    trainer = Trainer(make_config(folder, max_samples=LENGTH, control=ControlConfig(law="constant")), task=noisy)
    trainer.run()
    return waits, beats


def test_a_write_may_take_longer_than_a_collective(tmp_path):
    """All replicas beat between two turns of rank 0's wait, by samples and at the end, and the last save is there."""
    (waits, beats), (no_waits, _) = run_replicas(train_with_a_slow_disk, world_size=2, args=(str(tmp_path / "run"),))
    assert no_waits == []
    assert len(waits) >= 2 * TURNS  # before the second save, and for the last one
    assert all(timeout_s is not None and timeout_s < collective_timeout_s() for timeout_s in waits)
    assert set(range(1, len(waits) + 1)) <= set(beats)
    assert load_newest(tmp_path / "run" / "checkpoints").state["progress"]["position"] == LENGTH
