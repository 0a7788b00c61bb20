"""The `dptrain` command: runs a sub-command and turns its error into one sentence and an exit code."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from types import FrameType

from dptrain.cli.spelling import dashed
from dptrain.errors import (
    CheckpointError,
    ConfigError,
    DesyncError,
    DivergedError,
    DptrainError,
    PeerLostError,
    RendezvousError,
    TaskError,
)
from dptrain.runtime.signals import end_start_on_interrupt

_USAGE = """\
usage: dptrain [--version] COMMAND [OPTIONS]

commands:
  train    train a task on all GPUs (2 CPU replicas without one); measure the noise scale and adapt the batch
  tasks    list the built-in tasks
  bench    measure a task's training step: speed, memory, all-reduce bandwidth
  report   write report.html and figures for one run, or compare several
  plan     time and cost of a training on more GPUs, from one measured run
  sweep    train a grid of batch sizes and learning rates; fit steps against samples
  branch   measure the critical batch size with short runs from a checkpoint
  export   write the weights of a checkpoint to one safetensors file
  doctor   check machines, network and run folder before a run

`dptrain COMMAND --help` lists the options of a command.

exit codes:
  0   finished                              71  hung; ended by the watchdog
  1   crashed, see the traceback            74  a checkpoint cannot be written or verified
  2   wrong settings or task                75  stopped on request; continue with --resume
  65  training diverged                     76  the replicas disagree
  69  the rendezvous failed                 78  `doctor` found a problem
  70  other dptrain error
128 + n: a replica was killed by signal n
"""

_EXIT_CODES: tuple[tuple[type[DptrainError], int], ...] = (
    (ConfigError, 2),
    (TaskError, 2),
    (DivergedError, 65),
    (RendezvousError, 69),
    (CheckpointError, 74),
    (DesyncError, 76),
    (DptrainError, 70),
)

_EXTRAS = {
    "accelerate": "train",
    "filelock": "train",
    "jsonargparse": "train",
    "psutil": "train",
    "yaml": "train",
    "rich": "train",
    "safetensors": "train",
    "matplotlib": "report",
    "wandb": "wandb",
    "pyarrow": "tasks",
    "sklearn": "tasks",
}
"""Which extra of the package brings a module."""

_PATIENCE_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code, one of those that `dptrain --help` lists."""
    if arguments is None:
        _fix_order_of_sets(sys.argv[1:])
        _become_program(sys.argv[1:])
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--version"]:
        from dptrain.version import __version__

        sys.stdout.write(f"dptrain {__version__}\n")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0 if arguments else 2
    if arguments[0] not in _COMMANDS:
        close = get_close_matches(arguments[0], _COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        sys.stderr.write(f"dptrain: unknown command {arguments[0]!r}{meant} (commands: {', '.join(_COMMANDS)})\n")
        return 2
    return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    """Run a command; an error becomes one sentence and its exit code."""
    try:
        return _command(arguments[0])(dashed(arguments[1:]))
    except DptrainError as error:
        _report_error(error, command=arguments[0])
        return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        needs = f"needs the package {error.name}, which is not installed: pip install 'dptrain[{extra}]'"
        sys.stderr.write(f"dptrain {arguments[0]} {needs}\n")
        return 2
    except Exception as error:
        from dptrain.runtime.failure_report import write_failure

        if not write_failure(error):
            raise
        return 1


def _report_error(error: DptrainError, *, command: str) -> None:
    """Leave an error for the launcher that started this replica; without one, print it."""
    from dptrain.runtime.failure_report import write_failure
    from dptrain.runtime.launcher import is_silent_replica

    if write_failure(error):
        return
    if is_silent_replica() and not isinstance(error, PeerLostError):
        # torchrun kills all ranks when the first one ends, so ending now could cut off rank 0's message. Rank 0 usually
        # ends within this time and takes this rank with it; otherwise the error is this rank's own, and is printed.
        time.sleep(_PATIENCE_S)
    from dptrain.tracking.redact import printable

    sys.stderr.write(f"dptrain {command}: {printable(str(error))}\n")


def _fix_order_of_sets(arguments: Sequence[str]) -> None:
    """Start this process again with fixed hashes of text, where a task is going to be trained in it.

    By default each process of Python hashes text otherwise, and so has sets of text in another order. A vocabulary that
    is built from a set is then another one on each replica, and in each attempt. Replicas that one launcher has forked
    would be alike, and hide it. A seed that the user has set stays.
    """
    is_stdin = sys.argv[0] in ("", "-")  # whose text is read already
    if "PYTHONHASHSEED" in os.environ or arguments[:1] not in (["train"], ["sweep"], ["branch"]) or is_stdin:
        return
    os.environ["PYTHONHASHSEED"] = "0"
    # Held back until there is a handler again, in what follows.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - our own command


def _become_program(arguments: Sequence[str]) -> None:
    """Set up what a program has to itself: signals and standard streams."""
    # Until training handles Ctrl-C, it ends without a traceback. What was ignored on purpose, as by nohup, stays so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        starts_replicas = arguments[:1] == ["train"] and "RANK" not in os.environ
        signal.signal(signal.SIGINT, end_start_on_interrupt if starts_replicas else signal.SIG_DFL)
    if signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN:
        # "Save now" in the first seconds, when there is nothing to save yet, must not end the run. A handler and not
        # SIG_IGN, which the launcher would take for the wish of its starter.
        signal.signal(signal.SIGUSR1, _nothing_to_save)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    _fill_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a locale without "→" must not end a run


def _nothing_to_save(_number: int, _frame: FrameType | None) -> None:
    """Stand in the place of the default action."""


def _fill_closed_streams() -> None:
    """Open the null device for each closed standard stream.

    Otherwise the next file opened gets its number, and with it everything that libraries print.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode))


def _command(name: str) -> Callable[[Sequence[str]], int]:
    """Import a command when it is called: none waits for the imports of another.

    Raises:
        ConfigError: naming a package that is not installed.
    """
    try:
        module = importlib.import_module(f"dptrain.cli.{_PLACES.get(name, name)}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "dptrain" or package in _EXTRAS:
            raise
        wanted = _PACKAGES.get(package, package)
        raise ConfigError(
            f"this command needs the package {wanted}, which is not installed: pip install {wanted}"
        ) from error
    command: Callable[[Sequence[str]], int] = getattr(module, name)
    return command


_COMMANDS = ("train", "tasks", "bench", "report", "plan", "sweep", "branch", "export", "doctor")
_PLACES = {"bench": "operations.bench", "doctor": "operations.doctor"}
"""Modules of commands that are not named after them."""
_PACKAGES = {"yaml": "PyYAML", "sklearn": "scikit-learn"}
"""Names of packages that are imported by another one."""
