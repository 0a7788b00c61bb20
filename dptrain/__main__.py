"""`python -m dptrain`, which is what launchers start."""

import contextlib

from dptrain.cli.main import main

if __name__ == "__main__":
    code = main()
    # Only here, since it loads torch: a signal in the seconds before `main` would find no handler.
    with contextlib.suppress(ModuleNotFoundError):  # of an extra, which `main` has reported
        from dptrain.runtime.launcher import end_replica, is_replica

        if is_replica():
            end_replica(code)
    raise SystemExit(code)
