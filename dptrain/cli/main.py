"""The `dptrain` command: finds the sub-command and turns errors into one sentence with an exit code."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence

from dptrain.errors import CheckpointError, ConfigError, DesyncError, DptrainError, TaskError

_USAGE = """\
usage: dptrain [--version] COMMAND [OPTIONS]

commands:
  train    train a task on all GPUs, or on CPU replicas; measure the noise scale and adapt the batch
  report   draw report.png of a run folder

`dptrain COMMAND --help` lists the options of a command.
"""

_EXIT_CODES: tuple[tuple[type[DptrainError], int], ...] = (
    (ConfigError, 2),
    (TaskError, 2),
    (CheckpointError, 74),
    (DesyncError, 76),
    (DptrainError, 70),
)

_PATIENCE_S = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command and return the exit code.

    0 done; 2 settings or task wrong; 70 other error of dptrain; 74 checkpoint cannot be written or trusted;
    75 stopped on request, can be resumed; 76 replicas disagree.
    """
    if arguments is None:
        # This is the program itself: until training handles Ctrl-C, it ends without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands: dict[str, Callable[[Sequence[str]], int]] = {"train": _train, "report": _report}
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
        from dptrain.cli.replicas import is_silent_replica

        if is_silent_replica():
            # Were this one to end first, the launcher would end the others before rank 0 has told what is wrong. In
            # general rank 0 then ends, and with it this one; it speaks only where it is alone in its trouble.
            time.sleep(_PATIENCE_S)
        sys.stderr.write(f"dptrain {arguments[0]}: {error}\n")
        return next(code for kind, code in _EXIT_CODES if isinstance(error, kind))


# Each command is imported when it is called, so that none pays for another.
def _train(arguments: Sequence[str]) -> int:
    from dptrain.cli.train import train

    return train(arguments)


def _report(arguments: Sequence[str]) -> int:
    from dptrain.cli.report import report

    return report(arguments)
