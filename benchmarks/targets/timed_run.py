"""One training until its held-out loss is low enough, and two resident replicas that run one after another."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

WORLD_SIZE = 2
_PRELOADED = ["torch", "torch.distributed", "scipy.special", "sklearn.datasets", "dptrain", "dptrain.train"]
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class StepDelay:
    """Real sleep in each step of a training, which makes the step times of other hardware.

    Attributes:
        per_step_s: before each optimizer step, as an all-reduce over a slow network would take.
        per_sample_s: of a micro-batch, in its forward.
        full_at_samples: micro-batch up to which that takes as long as this one: a device that is not full.
    """

    per_step_s: float = 0.0
    per_sample_s: float = 0.0
    full_at_samples: int = 0

    def micro_batch_s(self, num_samples: int) -> float:
        """Return the sleep in the forward of a micro-batch."""
        return self.per_sample_s * max(num_samples, self.full_at_samples)


@dataclass(frozen=True, kw_only=True)
class TimedRun:
    """A training and where it ends.

    Attributes:
        settings: of the run, as `TrainConfig` takes them, groups as mappings; device and run_dir are filled in.
        target: held-out loss at which it ends.
        most_steps: optimizer steps after which it is given up.
        most_seconds: of training, after which it is given up.
        least_samples: that it goes on for at least, beyond the target.
        policy: "dptrain" or "adaptdl": who decides on the batch.
        delay: added to its steps.
    """

    settings: dict[str, Any]
    target: float
    most_steps: float
    most_seconds: float = math.inf
    least_samples: float = 0.0
    policy: str = "dptrain"
    delay: StepDelay = StepDelay()


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A place in a run.

    Attributes:
        steps: optimizer steps up to there.
        samples: the same in samples.
        seconds: the same in seconds of training, without start and evaluation.
        loss: held-out loss.
    """

    steps: float
    samples: float
    seconds: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Finish:
    """How a timed run ended.

    Attributes:
        end: where the target was reached; None where it was not.
        reason: why it was not.
        marks: of all evaluations.
        rows: some columns of some rows of metrics.jsonl.
        step_s: latest durations of steps, by (micro-batch, accumulation steps).
    """

    end: Mark | None
    reason: str
    marks: list[Mark]
    rows: list[dict[str, Any]]
    step_s: dict[tuple[int, int], list[float]]


class Pair:
    """Two gloo replicas in processes of their own, which stay and run one timed run after another.

    Starting a process and importing torch takes seconds, which a search of a hundred trainings cannot afford.
    """

    def __init__(self) -> None:
        _context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self._processes = []
        self._pipes: list[Connection] = []
        for rank in range(WORLD_SIZE):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_replica, args=(rank, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, timed_run: TimedRun) -> Finish:
        """Run a timed run on both replicas.

        Raises:
            RuntimeError: with the traceback of a replica that raised.
        """
        for pipe in self._pipes:
            pipe.send(timed_run)
        answers = [self._answer(pipe) for pipe in self._pipes]
        finish = answers[0]
        assert isinstance(finish, Finish)
        return finish

    def _answer(self, pipe: Connection) -> Finish | None:
        try:
            answer = pipe.recv()
        except EOFError:
            raise RuntimeError("a replica died in a timed run") from None
        if isinstance(answer, str):
            raise RuntimeError(f"a replica raised:\n{answer}")  # noqa: TRY004 - the text is a traceback
        return answer  # type: ignore[no-any-return]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()


def _replica(rank: int, folder: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    # As torchrun sets them: accelerate looks for its place there.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE), LOCAL_WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="1", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=loopback,
    )  # fmt: skip
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    from benchmarks.targets.timed_trainer import run_to_target

    number = 0
    while True:
        try:
            timed_run = pipe.recv()
        except EOFError:
            break
        number += 1
        try:
            with _silent():
                pipe.send(run_to_target(timed_run, run_dir=Path(folder) / f"run-{number}"))
        except BrokenPipeError:
            break  # the parent was stopped
        except BaseException:  # noqa: BLE001 - whatever it was, the parent must hear of it
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
