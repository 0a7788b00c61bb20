"""Trains a task to a loss in processes of their own, and reads from the run's folder what that took."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dptrain.explain.record import SAMPLES, RunRecord, column, read_jsonl, read_run

_STOPPED = 75
_POLL_S = 0.2


@dataclass(frozen=True, kw_only=True)
class Took:
    """What a run took to a loss.

    Attributes:
        samples: seen by then; all of the run where it never came there.
        seconds: in optimizer steps, without evaluations and saves.
        step_s: the median time of a step.
        reached: whether it came there.
    """

    samples: float
    seconds: float
    step_s: float
    reached: bool


def train(folder: Path, *, replicas: int, settings: dict[str, str], target: float | None = None) -> RunRecord:
    """Run `dptrain train` on so many replicas of one thread each, to the end or until its held-out loss is at a target.

    Args:
        folder: of the run, which is not there yet.
        replicas: processes on this machine's CPU.
        settings: of the run, by their dotted names.
        target: held-out loss at which it may stop.

    Raises:
        RuntimeError: where it failed, with what it said.
    """
    options = {"run_dir": str(folder), "replicas": str(replicas), "device": "cpu", "log.tracker": "none", **settings}
    command = [sys.executable, "-m", "dptrain", "train", *(f"--{name}={value}" for name, value in options.items())]
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            _wait(process, folder / "metrics.jsonl", target=target)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode not in (0, _STOPPED):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(errors='replace')}")
    return read_run(folder)


def _wait(process: subprocess.Popen[bytes], metrics: Path, *, target: float | None) -> None:
    """Wait for the end, and ask for it where the target is reached."""
    asked = False
    while process.poll() is None:
        time.sleep(_POLL_S)
        if target is None or asked or not metrics.exists():
            continue
        losses = (row.get("eval/loss") for row in read_jsonl(metrics))
        if any(loss is not None and loss <= target for loss in losses):
            process.send_signal(signal.SIGTERM)
            asked = True


def took(record: RunRecord, *, target: float) -> Took:
    """Return what a run took until its held-out loss first crossed a target, on straight lines between evaluations."""
    samples, losses = column(record.evals, SAMPLES), column(record.evals, "eval/loss")
    below = np.flatnonzero(losses <= target)
    end = column(record.train, SAMPLES)
    at = float(end[-1]) if not len(below) else _crossing(samples, losses, int(below[0]), target=target)
    seconds = column(record.train, "time/step_s")
    step_s = float(np.nanmedian(seconds))
    lengths = np.diff(end, prepend=0.0)
    shares = np.clip((at - (end - lengths)) / lengths, 0.0, 1.0)
    # A step beside an evaluation is not timed; it took as long as the others.
    return Took(
        samples=at,
        seconds=float(np.sum(shares * np.where(np.isfinite(seconds), seconds, step_s))),
        step_s=step_s,
        reached=bool(len(below)),
    )


def _crossing(
    samples: np.ndarray[tuple[int], np.dtype[np.float64]],
    losses: np.ndarray[tuple[int], np.dtype[np.float64]],
    index: int,
    *,
    target: float,
) -> float:
    if index == 0:
        return float(samples[0])
    (x0, x1), (y0, y1) = samples[index - 1 : index + 1], losses[index - 1 : index + 1]
    return float(x0 + (x1 - x0) * (y0 - target) / (y0 - y1))
