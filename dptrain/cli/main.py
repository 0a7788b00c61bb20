"""The `dptrain` command: finds the sub-command and turns errors into one sentence with an exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

from dptrain.errors import (
    CheckpointError,
    ConfigError,
    DesyncError,
    DivergedError,
    DptrainError,
    RendezvousError,
    TaskError,
)

_USAGE = """\
usage: dptrain [--version] COMMAND [OPTIONS]

commands:
  train    train a task on all GPUs, or on CPU replicas; measure the noise scale and adapt the batch
  sweep    train a grid of batches and learning rates, and fit the frontier of steps against samples
  plan     say what more GPUs would buy, in hours and money, from one run that measured its noise scale
  branch   find the critical batch by short runs from a checkpoint, as ground truth beside the noise scale
  report   write report.html and pictures of a run folder, or of several
  export   write the bare weights of a checkpoint to one file

`dptrain COMMAND --help` lists the options of a command.

exit codes:
  0   done                                  71  hung, and ended by a watchdog
  1   crashed; the traceback says where     74  a checkpoint cannot be written or trusted
  2   settings or task are wrong            75  stopped on request, with a checkpoint: --resume goes on
  65  training diverged                     76  the replicas disagree
  69  the replicas did not meet             70  another error of dptrain
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

_PATIENCE_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code, one of those that `dptrain --help` lists."""
    if arguments is None:
        # This is the program itself: until training handles Ctrl-C, it ends without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _fill_closed_streams()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": _train,
        "sweep": _sweep,
        "plan": _plan,
        "branch": _branch,
        "report": _report,
        "export": _export,
    }
    if arguments[:1] == ["--version"]:
        from dptrain.version import __version__

        sys.stdout.write(f"dptrain {__version__}\n")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE)
        return 0 if arguments else 2
    command = commands.get(arguments[0])
    if command is None:
        sys.stderr.write(f"dptrain: there is no command {arguments[0]!r}; commands are {', '.join(commands)}\n")
        return 2
    try:
        return command(arguments[1:])
    except DptrainError as error:
        _tell(error, command=arguments[0])
        return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))
    except Exception as error:
        from dptrain.runtime.failure_report import write_failure

        if not write_failure(error):
            raise
        return 1


def _tell(error: DptrainError, *, command: str) -> None:
    """Tell the launcher of the replicas, if there is one that listens, or else the user."""
    from dptrain.runtime.failure_report import write_failure
    from dptrain.runtime.launcher import is_silent_replica

    if write_failure(error):
        return
    if is_silent_replica():
        # Were this one to end first, torchrun would end the others before rank 0 has told what is wrong. In general
        # rank 0 then ends, and with it this one; it speaks only where it is alone in its trouble.
        time.sleep(_PATIENCE_S)
    from dptrain.tracking.redact import printable

    sys.stderr.write(f"dptrain {command}: {printable(str(error))}\n")


def _fill_closed_streams() -> None:
    """Open the null device where a standard stream is closed.

    Else the next file that is opened has its number, and gets what libraries print to it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode))


# Each command is imported when it is called, so that none pays for another.
def _train(arguments: Sequence[str]) -> int:
    from dptrain.cli.train import train

    return train(arguments)


def _sweep(arguments: Sequence[str]) -> int:
    from dptrain.cli.sweep import sweep

    return sweep(arguments)


def _plan(arguments: Sequence[str]) -> int:
    from dptrain.cli.plan import plan

    return plan(arguments)


def _branch(arguments: Sequence[str]) -> int:
    from dptrain.cli.branch import branch

    return branch(arguments)


def _report(arguments: Sequence[str]) -> int:
    from dptrain.cli.report import report

    return report(arguments)


def _export(arguments: Sequence[str]) -> int:
    from dptrain.cli.export import export

    return export(arguments)
