"""`python -m dptrain`, which is what launchers start."""

from dptrain.cli.main import main
from dptrain.runtime.launcher import end_replica, is_replica

if __name__ == "__main__":
    code = main()
    if is_replica():
        end_replica(code)
    raise SystemExit(code)
