"""`python -m dptrain`, which is what launchers start."""

from dptrain.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
