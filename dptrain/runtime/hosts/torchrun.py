"""torchrun with the exit code of the replica that failed first, by which schedulers decide; torchrun's own is always 1.

python -m dptrain.runtime.hosts.torchrun --standalone --nproc-per-node 8 -m dptrain train --config run.yaml
"""

from __future__ import annotations

import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from dptrain.runtime.signals import EXIT_HUNG, EXIT_RESUMABLE

_EXIT_RENDEZVOUS = 69
_OF_OTHERS = frozenset({70, EXIT_HUNG, EXIT_RESUMABLE, 128 + signal.SIGTERM, -signal.SIGTERM})
"""How a replica ends that lost a peer, or that torchrun stops once another one has failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; return the exit code of the last attempt's first failure, one of those of `dptrain --help`.

    After a signal to torchrun itself it is 128 + its number, or what all replicas of this host ended with: 75 where
    they have stopped and can be resumed, 0 where the run was just done.

    Args:
        arguments: torchrun's; by default those of the process.
    """
    with _replicas() as replicas:
        try:
            run.main(arguments)
        except ChildFailedError as error:
            sys.stderr.write(f"{error}\n")  # torch's table of failures
            return first_code(error.failures)
        except SignalException as error:
            sys.stderr.write(f"{error}\n")
            codes = {replica.poll() for replica in replicas}
            return next(code for code in codes if code is not None) if codes in _WANTED else 128 + error.sigval
        except RendezvousError:
            traceback.print_exc()
            return _EXIT_RENDEZVOUS
    return 0


_WANTED: tuple[set[int | None], ...] = ({0}, {EXIT_RESUMABLE})
"""What replicas end with that have done what they were asked for."""


def first_code(failures: Mapping[int, ProcessFailure]) -> int:
    """Return the exit code of the failure behind the others, 128 + n for a replica that was killed by signal n.

    torch tells times in whole seconds, looks at all replicas ten times a second, and counts those as failures that it
    has stopped itself. So a code that a replica cannot have got by another one comes first, and then the order in time.

    Args:
        failures: by rank, in the order in which they were found.
    """
    found = min(failures.values(), key=lambda failure: (failure.exitcode in _OF_OTHERS, failure.timestamp))
    return found.exitcode if found.exitcode > 0 else 128 - found.exitcode


@contextmanager
def _replicas() -> Iterator[list[subprocess.Popen[Any]]]:
    """Note the processes of the newest attempt: torchrun tells nobody how they ended after a signal."""
    started: list[subprocess.Popen[Any]] = []
    begin = subprocess.Popen.__init__

    @wraps(begin)
    def noted(process: subprocess.Popen[Any], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Popen's own
        begin(process, *args, **kwargs)
        environment = kwargs.get("env") or {}
        if "LOCAL_WORLD_SIZE" in environment:
            started.append(process)
            del started[: -int(environment["LOCAL_WORLD_SIZE"])]

    subprocess.Popen.__init__ = noted  # type: ignore[method-assign, assignment]
    try:
        yield started
    finally:
        subprocess.Popen.__init__ = begin  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
