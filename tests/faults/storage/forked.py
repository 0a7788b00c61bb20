"""Runs a body in a child process that never comes back into pytest."""

from __future__ import annotations

import os
import traceback


def forked(body):
    """Run `body` in a child of its own and return its pid; the child never comes back into pytest."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        body()
        code = 0
    except BaseException:  # noqa: BLE001 -- whatever it was, it is shown
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
