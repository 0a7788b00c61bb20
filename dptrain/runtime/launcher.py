"""Starts the replicas of one node, passes signals on, watches how they end; what a replica does is not known here."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import math
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from dptrain.error_text import shown
from dptrain.errors import ConfigError
from dptrain.runtime.failure_report import Cause, Ending, read_failures, read_outcome, root_cause
from dptrain.runtime.restart_policy import Attempts, RestartPolicy
from dptrain.runtime.signals import EXIT_RESUMABLE, SHOW_STACKS, NotedSignals, end_of_start, show_stacks_on_signal
from dptrain.tracking.run_folder import holds_run, newest_step

GRACE_S = 30.0
"""From a request to stop to the end of the replicas, whatever they do by then; what schedulers usually allow."""

_TICK_S = 0.02
_LAST_WORDS_S = 2.0  # for what the others have to say, once the cause is known
_PATIENCE_S = 10.0  # for the cause, where the first to end says that it lies with another
_REPEAT_S = 2.0  # what comes sooner is the same request; a later one means it
_AT_ONCE_S = 1.0
_MOST_REPLICAS = 1024  # more is a typing error, and as many processes would be started
_STACKS_S = 0.5  # for the stacks of one replica, which take milliseconds where it gets a core

_STOP = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
_PASSED_ON = _STOP | {signal.SIGUSR1}
_PR_SET_PDEATHSIG = 1

_STARTERS = {
    "SLURM_STEP_NUM_TASKS": ("srun", "launch/slurm.sbatch, or srun --ntasks 1"),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "launch/torchrun.sh on each host, or mpirun -n 1"),
    "PMI_SIZE": ("mpiexec", "launch/torchrun.sh on each host, or mpiexec -n 1"),  # MPICH and Intel MPI
}
"""Variable with the number of tasks that a job step has → what started them, and what to use instead."""

_NEEDED_LATER = ("dptrain.train", "torch.distributed.tensor", "torch._dynamo", "scipy.special")
"""Modules that a replica would load at its first use, when it wraps its model and reads the noise scale."""


def is_replica(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_silent_replica(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a replica whose errors another one most likely tells already."""
    return is_replica(environment) and environment["RANK"] != "0"


def refuse_in_many_tasks(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to become one of several launchers that fight for a run folder.

    Raises:
        ConfigError: where srun, mpirun or mpiexec has started several of this command, none of them as a replica.
    """
    for variable, (starter, remedy) in _STARTERS.items():
        num_tasks = environment.get(variable) or "1"
        if num_tasks != "1":
            raise ConfigError(
                f"{starter} started {num_tasks} of this command, and each would start replicas of its own: use {remedy}"
            )


def end_replica(code: int) -> NoReturn:
    """End this process where it stands; what it had to write is written and closed.

    The interpreter's own end would drop the last reference to the process group, whose destructor joins torch's threads
    with the interpreter lock held, for which one of them may just be waiting: about one run in forty hung at its very
    end on busy cores.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def count_gpus(*, cpu: bool) -> int:
    """Return how many GPUs there are to use; with `cpu`, none."""
    if cpu:
        return 0
    import torch

    return torch.cuda.device_count()


def start_replicas(
    arguments: Sequence[str],
    *,
    num_replicas: int,
    run_dir: Path,
    max_restarts: int | None = None,
    grace_s: float = GRACE_S,
    fork: bool = True,
) -> int:
    """Run `dptrain ARGUMENTS` as `num_replicas` processes, again where that can help, and wait for the end.

    Replicas meet in a private folder and use the loopback device alone. A failure is reported once, by its root
    cause. A request to stop (SIGINT, SIGTERM, SIGHUP) is passed on, and so is SIGUSR1.

    Args:
        arguments: of a command that goes on with `run_dir` when `--resume` is added.
        num_replicas: at least 1.
        run_dir: where checkpoints show what an attempt has brought.
        max_restarts: see `RestartPolicy`.
        grace_s: seconds from a request to stop to the end of the replicas, whatever they do by then.
        fork: let them be copies of this process, which has loaded everything: ready at once. Not where they use a GPU,
            since CUDA does not survive it.

    Returns:
        0; 75 where all replicas stopped on request with a checkpoint; else the code of what went wrong first,
        128 + n for a replica that was killed by signal n.

    Raises:
        ConfigError: for numbers that make no sense.
    """
    _check(num_replicas=num_replicas, max_restarts=max_restarts, grace_s=grace_s)
    policy, attempts = RestartPolicy(max_restarts=max_restarts), Attempts(step=newest_step(run_dir))
    if fork:
        load_for_all()
    end_of_start()
    with _Signals() as signals:
        while True:
            with tempfile.TemporaryDirectory(prefix="dptrain-") as folder:
                attempt = _Attempt(Path(folder), number=attempts.num_restarts, grace_s=grace_s, signals=signals)
                cause = attempt.run(arguments, num_replicas=num_replicas, fork=fork)
            step = newest_step(run_dir)
            cause = _stopped_early(cause, step=step) if signals.asked_to_stop else cause
            verdict = policy.decide(attempts, code=cause.code, step=step, failure=cause.failure(step=step))
            again = verdict.again and not signals.asked_to_stop
            _tell(cause, _from(step) if again else verdict.reason)
            if not again:
                return cause.code
            attempts = verdict.attempts
            if "--resume" not in arguments and holds_run(run_dir):
                arguments = [*arguments, "--resume"]


def load_for_all() -> None:
    """Load what replicas and trainings need, once for all that are forked from this process afterwards."""
    for name in _NEEDED_LATER:
        importlib.import_module(name)
    # Neither this process nor its copies need look for garbage in what is loaded; a second less at each end.
    gc.freeze()


def _check(*, num_replicas: int, max_restarts: int | None, grace_s: float) -> None:
    if not 1 <= num_replicas <= _MOST_REPLICAS:
        wanted = "at least 1" if num_replicas < 1 else f"at most {_MOST_REPLICAS} on one host"
        raise ConfigError(f"--replicas must be {wanted}, got {shown(num_replicas)}")
    if max_restarts is not None and max_restarts < 0:
        raise ConfigError(f"--max-restarts must be at least 0, got {max_restarts}")
    if not 0 < grace_s < math.inf:
        raise ConfigError(f"--grace must be a number of seconds above 0, got {grace_s:g}")


def _stopped_early(cause: Cause, *, step: int) -> Cause:
    """Say of replicas that a request to stop has met before they could save what that means."""
    number = cause.code - 128
    if number not in _STOP:
        return cause
    if step:
        return Cause(
            code=EXIT_RESUMABLE, sentence=f"stopped on request before a further step was saved; step {step:,} is saved"
        )
    return Cause(code=cause.code, sentence="stopped on request before a step was saved: there is nothing to resume")


def _from(step: int) -> str:
    return f"starting again from {f'step {step:,}' if step else 'the beginning'}"


def _tell(cause: Cause, what_now: str) -> None:
    if cause.sentence:
        sys.stderr.write(f"{cause.trace}dptrain train: {'; '.join(filter(None, [cause.sentence, what_now]))}\n")
        sys.stderr.flush()


class _Signals(NotedSignals):
    """Notes the signals that are to be passed on, while it is entered.

    Attributes:
        asked_to_stop: whether one of them was a request to stop.
    """

    def __init__(self) -> None:
        super().__init__(_PASSED_ON)
        self.asked_to_stop = False
        self._noted: deque[int] = deque()

    def _note(self, number: int) -> None:
        self._noted.append(number)
        self.asked_to_stop = self.asked_to_stop or number in _STOP

    def take(self) -> Iterator[int]:
        """Yield what came since the last call."""
        while self._noted:
            yield self._noted.popleft()


class _Attempt:
    """One start of all replicas, to the end of the last of them.

    Args:
        folder: private and empty; here they meet and leave their failure reports.
        number: of the attempt, from 0.
        grace_s: from a request to stop to their end.
        signals: to be passed on.
    """

    def __init__(self, folder: Path, *, number: int, grace_s: float, signals: _Signals) -> None:
        self._folder = folder
        self._number = number
        self._grace_s = grace_s
        self._signals = signals
        self._processes: list[BaseProcess] = []
        self._endings: list[Ending] = []
        self._killed: set[int] = set()
        self._deadline_s = math.inf
        self._first_stop_s = math.inf

    def run(self, arguments: Sequence[str], *, num_replicas: int, fork: bool) -> Cause:
        """Start the replicas, wait for the last of them, and say what it came to."""
        try:
            for rank in range(num_replicas):
                self._start(arguments, rank=rank, num_replicas=num_replicas, fork=fork)
            while len(self._endings) < num_replicas:
                self._pass_signals_on()
                self._note_endings()
                if time.monotonic() > self._deadline_s:
                    self._show_stacks()
                    self._kill()
                time.sleep(_TICK_S)
        finally:
            self._kill()
        cause = root_cause(self._endings, killed=self._killed, asked_to_stop=self._signals.asked_to_stop)
        if cause.sentence:
            self._sweep()
        return cause

    def _start(self, arguments: Sequence[str], *, rank: int, num_replicas: int, fork: bool) -> None:
        process = multiprocessing.get_context("fork").Process(
            target=_become_replica,
            args=(arguments,),
            kwargs={
                "environment": self._environment(rank=rank, num_replicas=num_replicas),
                "launcher": os.getpid(),
                "fork": fork,
            },
        )
        # Held back, so that none reaches a replica while it still has the launcher's handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        self._processes.append(process)

    def _environment(self, *, rank: int, num_replicas: int) -> dict[str, str]:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        defaults = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_replicas)),
            "GLOO_SOCKET_IFNAME": loopback,
            "NCCL_SOCKET_IFNAME": loopback,  # not run on a GPU
            "PYTHONFAULTHANDLER": "1",
        }
        return {name: value for name, value in defaults.items() if not os.environ.get(name)} | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_replicas),
            "LOCAL_WORLD_SIZE": str(num_replicas),
            "DPTRAIN_STORE": str(self._folder / "store"),
            "DPTRAIN_ATTEMPT": str(self._number),
            # A replica that cannot stop says where it stands, before it would be killed without a word.
            "DPTRAIN_GRACE_S": f"{self._grace_s * 5 / 6:g}",
        }

    def _alive(self) -> list[tuple[int, BaseProcess]]:
        ended = {ending.rank for ending in self._endings}
        return [(rank, process) for rank, process in enumerate(self._processes) if rank not in ended]

    def _pass_signals_on(self) -> None:
        now_s = time.monotonic()
        for number in self._signals.take():
            if number in _STOP:
                self._first_stop_s = min(self._first_stop_s, now_s)
                is_repeat = now_s - self._first_stop_s > _REPEAT_S
                self._end_within(_AT_ONCE_S if is_repeat else self._grace_s)
            for _, process in self._alive():
                # They have no terminal that could hang up.
                os.kill(process.pid or 0, signal.SIGTERM if number == signal.SIGHUP else number)

    def _note_endings(self) -> None:
        for rank, process in self._alive():
            if process.exitcode is None:
                continue
            ending = Ending(
                rank=rank,
                code=process.exitcode,
                report=read_failures(self._folder, rank=rank),
                outcome=read_outcome(self._folder, rank=rank),
            )
            self._endings.append(ending)
            if not ending.is_wanted:
                cause_will_speak = ending.is_consequence and not ending.blames_a_hang
                self._end_within(_PATIENCE_S if cause_will_speak else _LAST_WORDS_S)

    def _end_within(self, seconds: float) -> None:
        self._deadline_s = min(self._deadline_s, time.monotonic() + seconds)

    def _show_stacks(self) -> None:
        """Have replicas that do not end show where they stand, each under its rank; a frozen one is woken for it."""
        if self._signals.asked_to_stop:
            return  # each shows its own at the end of its grace
        if any(not ending.is_wanted and not ending.is_consequence for ending in self._endings):
            return  # the cause is known, and lies elsewhere
        for rank, process in self._alive():
            sys.stderr.write(f"dptrain: replica {rank} of {len(self._processes)} did not end; it stands here:\n")
            sys.stderr.flush()
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, SHOW_STACKS)
                os.kill(process.pid or 0, signal.SIGCONT)
            process.join(_STACKS_S)

    def _kill(self) -> None:
        for rank, process in self._alive():
            self._killed.add(rank)
            process.kill()
            process.join()

    def _sweep(self) -> None:
        """Kill what replicas that ended badly have left, such as processes that load samples."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)


def _become_replica(arguments: Sequence[str], *, environment: Mapping[str, str], launcher: int, fork: bool) -> None:
    """Turn this copy of the launcher into a replica; ends the process."""
    os.setsid()  # a terminal's Ctrl-C goes to the launcher alone, which passes it on once
    die_with(launcher)
    for number in _PASSED_ON:
        # Until a replica can save on demand it has nothing to save.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGUSR1 else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    os.environ.update(environment)
    if not fork:
        os.execv(sys.executable, [sys.executable, "-m", "dptrain", *arguments])  # noqa: S606 - our own command
    faulthandler.enable()
    show_stacks_on_signal()
    if "OMP_NUM_THREADS" in environment:  # which this process has read when it was the launcher
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = ["dptrain", *arguments]
    runpy.run_module("dptrain", run_name="__main__")


def die_with(launcher: int) -> None:
    """Have the kernel kill this process when its launcher is gone: an orphan would write on. Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != launcher:  # it was gone before
        os._exit(128 + signal.SIGKILL)
