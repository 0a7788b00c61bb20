"""Signals that ask a run to stop: the step under way is finished, a checkpoint written, and the run can be resumed."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Self

EXIT_RESUMABLE = 75
"""Exit code of a run that stopped on request with a checkpoint (EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT_S = 2.0


class StopRequest:
    """Notes SIGINT and SIGTERM while it is entered.

    Launchers pass one Ctrl-C on more than once, so that a second signal within two seconds is the same request; a
    later one means it, and ends the process where it stands.

    Attributes:
        requested: whether to stop after the step under way.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_s = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self._first_s > _REPEAT_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.requested:
            self.requested, self._first_s = True, time.monotonic()
