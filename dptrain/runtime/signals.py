"""Signals: stop after the step under way, or save and go on; noticed at once, also while a replica is blocked."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import FrameType
from typing import Self

EXIT_RESUMABLE = 75
"""Exit code of a run that stopped on request with a checkpoint (EX_TEMPFAIL)."""

EXIT_HUNG = 71
"""Exit code of a replica that could not stop within its grace (EX_OSERR)."""

SHOW_STACKS = signal.SIGUSR2
"""Has a replica show the stacks of all of its threads and go on; from C, so that a held lock does not matter."""

_STOP = frozenset({signal.SIGINT, signal.SIGTERM})
_SAVE = frozenset({signal.SIGUSR1})
_REPEAT_S = 2.0
_GRACE_S = 25.0


_requested_here = threading.Event()


def was_asked_to_stop() -> bool:
    """Whether this very process, and not just another replica, has been asked to stop."""
    return _requested_here.is_set()


def end_start_on_interrupt(number: int, _frame: FrameType | None) -> None:
    """Handle Ctrl-C while a launcher loads: say that nothing is lost, and end as by the default action."""
    signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # nobody reads it; not by `sys.stderr`, which may be in the middle of a line
        os.write(2, b"dptrain train: stopped before training began: nothing was written; start it again as before\n")
    os.kill(os.getpid(), number)


def end_of_start() -> None:
    """Let Ctrl-C end this process without that sentence, which is not true any more once replicas are started."""
    if signal.getsignal(signal.SIGINT) is end_start_on_interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def show_stacks_on_signal() -> None:
    """Answer `SHOW_STACKS` on stderr."""
    with contextlib.suppress(ValueError, OSError):  # not a file, as under a test
        faulthandler.register(SHOW_STACKS, file=sys.__stderr__ or sys.stderr, all_threads=True)


def place_of_replica() -> str:
    """Return this process's place for the heading of its stacks, such as "replica 1 of 4"."""
    return f"replica {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"


class NotedSignals(ABC):
    """Notes signals while it is entered; afterwards they have the handlers that they had before.

    What somebody chose to ignore, such as `nohup` the hang-up, stays ignored.

    Args:
        numbers: of the signals.
    """

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._numbers = tuple(numbers)
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in self._numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, lambda number, _: self._note(number))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @abstractmethod
    def _note(self, number: int) -> None:
        """Note a signal that came."""


class SignalHandler:
    """Notes SIGINT, SIGTERM and SIGUSR1 while it is entered, in the main thread; elsewhere it does nothing.

    Python runs a handler between two lines of its main thread, which may be blocked in a collective for minutes. So
    the handlers do nothing, and a thread reads what the interpreter's own C handler writes into a pipe at once. The
    thread only sets flags, and watches the clock: a replica that cannot stop within its grace, because a peer of it
    hangs, tells where it stands and ends.

    Launchers pass one Ctrl-C on more than once, so that a second signal within two seconds is the same request; a
    later one means it, and ends the process where it stands.

    Args:
        grace_s: seconds from the first request to the end of the process, whatever it does by then. Default:
            DPTRAIN_GRACE_S from the environment, or 25: five less than launchers wait.

    Attributes:
        requested: whether to stop after the step under way.
    """

    def __init__(self, *, grace_s: float | None = None) -> None:
        self.requested = False
        self._save = False
        self._grace_s = float(os.environ.get("DPTRAIN_GRACE_S", _GRACE_S)) if grace_s is None else grace_s
        self._first_s = 0.0
        self._previous: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1
        self._ended = threading.Event()

    def take_save(self) -> bool:
        """Return whether a checkpoint was asked for since the last call."""
        save, self._save = self._save, False
        return save

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(self._pipe[0], True)
            self._previous_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, _do_nothing) for number in _STOP | _SAVE}
            threading.Thread(target=self._listen, args=(self._pipe[0],), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._pipe is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._pipe[1])  # the thread reads the end, and closes the other side
        self._pipe = None

    def _listen(self, descriptor: int) -> None:
        with contextlib.suppress(OSError):
            while numbers := os.read(descriptor, 64):
                for number in numbers:
                    self._note(number)
        os.close(descriptor)

    def _note(self, number: int) -> None:
        if number in _SAVE:
            self._save = True
        elif number in _STOP and not self.requested:
            _requested_here.set()
            self.requested, self._first_s = True, time.monotonic()
            threading.Thread(target=self._give_up_late, name="grace", daemon=True).start()
        elif number in _STOP and time.monotonic() - self._first_s > _REPEAT_S:
            os._exit(128 + number)

    def _give_up_late(self) -> None:
        if self._ended.wait(self._grace_s):
            return
        sys.stderr.write(
            f"dptrain: {place_of_replica()} was asked to stop and could not within {self._grace_s:g} s; "
            "it stands here:\n"
        )
        sys.stderr.flush()
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
        os._exit(EXIT_HUNG)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Stand in the place of the default action; the thread does the rest."""
