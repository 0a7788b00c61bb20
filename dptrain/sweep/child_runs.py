"""Several `dptrain train` side by side: each is started, stopped and watched here; what they are for is not known."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dptrain.errors import ConfigError
from dptrain.runtime.launcher import count_gpus, die_with, end_replica

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LAST_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where trainings go.

    Attributes:
        num_parallel: trainings at a time, each in a slot of its own, numbered from 0.
        num_replicas: of each training.
        gpus: names of the GPUs as CUDA_VISIBLE_DEVICES has them; empty for none.
        num_threads: of each replica on the CPU.
    """

    num_parallel: int
    num_replicas: int
    gpus: Sequence[str]
    num_threads: int

    @classmethod
    def here(cls, *, num_parallel: int | None, num_replicas: int, cpu: bool) -> Site:
        """Fill the cores of this machine, or its GPUs.

        Args:
            num_parallel: trainings at a time; by default as many as have cores or GPUs of their own.
            num_replicas: of each training.
            cpu: whether GPUs are to be left alone.

        Raises:
            ConfigError: where a training has more replicas than there are GPUs, or a number is below 1.
        """
        for name, value in (("--parallel", num_parallel), ("--replicas", num_replicas)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        gpus = _gpus(count_gpus(cpu=cpu))
        if gpus and num_replicas > len(gpus):
            raise ConfigError(f"--replicas is {num_replicas}, but there are {len(gpus)} GPUs: use at most so many")
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        num_slots = max(1, len(gpus or range(cores)) // num_replicas)
        num_parallel = num_parallel or num_slots
        if gpus and num_parallel > num_slots:
            raise ConfigError(
                f"--parallel is {num_parallel}, but {len(gpus)} GPUs have room for {num_slots} trainings of "
                f"{num_replicas} replicas: use at most so many"
            )
        return cls(
            num_parallel=num_parallel,
            num_replicas=num_replicas,
            gpus=gpus,
            num_threads=max(1, cores // (num_parallel * num_replicas)),
        )

    def environment(self, slot: int) -> dict[str, str]:
        """Return what a training in a slot has in its environment beside what is there."""
        mine = self.gpus[slot * self.num_replicas : (slot + 1) * self.num_replicas]
        threads = {} if os.environ.get("OMP_NUM_THREADS") else {"OMP_NUM_THREADS": str(self.num_threads)}
        return threads | ({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})


def _gpus(count: int) -> list[str]:
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[:count] if visible else [str(number) for number in range(count)]


class RunProcess:
    """One `dptrain train`.

    It is a copy of this process, which has everything loaded, so that it is at work at once; where there are GPUs,
    which a copy could not use, it is a fresh interpreter. It dies with this process (on Linux), and a terminal's
    Ctrl-C does not reach it.

    Args:
        arguments: of `dptrain`.
        log: takes what it prints, behind what is in there.
        environment: beside what is there.
        fork: whether it may be a copy.
    """

    def __init__(self, arguments: Sequence[str], *, log: Path, environment: Mapping[str, str], fork: bool) -> None:
        self.log = log
        self._is_asked = False
        self._process = multiprocessing.get_context("fork").Process(
            target=_become_run,
            args=(list(arguments),),
            kwargs={"log": log, "environment": dict(environment), "launcher": os.getpid(), "fork": fork},
        )
        self._process.start()

    @property
    def code(self) -> int | None:
        """Exit code, or minus the number of the signal that killed it; None while it runs."""
        return self._process.exitcode

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether `stop` was called."""
        return self._is_asked

    def stop(self) -> None:
        """Ask it once to save and end."""
        if not self._is_asked and self.code is None:
            self._is_asked = True
            self._process.terminate()

    def kill(self) -> None:
        """End it where it stands."""
        self._process.kill()
        self._process.join()

    def last_line(self) -> str:
        """Return the last line that it printed, or an empty one."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LAST_BYTES))
                lines = file.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""


def _become_run(arguments: list[str], *, log: Path, environment: Mapping[str, str], launcher: int, fork: bool) -> None:
    """Turn this copy of the sweep into a training; ends the process."""
    os.setsid()
    die_with(launcher)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(descriptor, stream)
    # Those of the sweep may be anything, and may hold what it has not written yet.
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, errors="backslashreplace") for stream in (1, 2))
    os.environ.update(environment)
    if not fork:
        os.execv(sys.executable, [sys.executable, "-m", "dptrain", *arguments])  # noqa: S606 - our own command
    os.environ.setdefault(
        "PYTHONHASHSEED", "0"
    )  # a copy has the hashes of its sweep, and need not start again for others
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = ["dptrain", *arguments]
    try:
        runpy.run_module("dptrain", run_name="__main__")
    except SystemExit as ended:
        end_replica(ended.code if isinstance(ended.code, int) else 1)
