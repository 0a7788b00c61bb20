"""Checkpoints under fire: writers killed at random moments, single bits flipped; each must be survived or detected."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from pathlib import Path

import torch

from dptrain.checkpoint.store import load_checkpoint, load_newest, save_checkpoint
from dptrain.errors import CheckpointError

_KEEP = 2


def kill_writers(folder: Path, *, num_kills: int, seed: int) -> int:
    """Kill so many writers, each some time after its first checkpoint, and count the acknowledged ones that were lost.

    A checkpoint is acknowledged when its writer has said so through a pipe, after `save_checkpoint` returned.
    """
    seeded = random.Random(seed)  # noqa: S311 - repeatable, not secret
    step, lost = 0, 0
    for _ in range(num_kills):
        acknowledged = _kill_one(folder, first_step=step + 1, delay_s=0.02 * seeded.random())
        found = load_newest(folder)
        step = 0 if found is None else found.step
        lost += step < acknowledged
    return lost


def _kill_one(folder: Path, *, first_step: int, delay_s: float) -> int:
    """Fork a writer, kill it, and return the last step that it acknowledged."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        for step in range(first_step, first_step + 10_000):
            _save(folder, step)
            os.write(writer, f"{step}\n".encode())
        os._exit(0)
    os.close(writer)
    assert select.select([reader], [], [], 60)[0], "the writer never saved anything"
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as acknowledgements:
        return int(acknowledgements.read().split()[-1])


def flip_bits(folder: Path, *, num_flips: int, seed: int) -> int:
    """Flip so many single bits of a checkpoint, one at a time, and count those that were detected."""
    seeded = random.Random(seed)  # noqa: S311 - repeatable, not secret
    newest = _save(folder, 1)
    files = [(path, path.read_bytes()) for path in sorted(newest.iterdir())]
    detected = 0
    for _ in range(num_flips):
        path, content = seeded.choice(files)
        place = seeded.randrange(len(content))
        with path.open("r+b", buffering=0) as file:
            file.seek(place)
            file.write(bytes([content[place] ^ 1 << seeded.randrange(8)]))
            try:
                load_checkpoint(newest)
            except CheckpointError:
                detected += 1
            file.seek(place)
            file.write(content[place : place + 1])
    load_checkpoint(newest)
    return detected


def _save(folder: Path, step: int) -> Path:
    tensors = {"model": {"weight": torch.full((16, 16), float(step))}, "optimizer": {"moment": torch.ones(16)}}
    return save_checkpoint(folder, step=step, tensors=tensors, state={"step": step}, keep=_KEEP)
