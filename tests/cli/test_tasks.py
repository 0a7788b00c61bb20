"""`dptrain tasks` lists what `--task` takes."""

from __future__ import annotations

from dptrain.tasks import BUILT_IN
from tests.cli.test_train import outcome


def test_every_built_in_task_is_listed():
    """One line each, with the options of its function."""
    code, stdout, stderr = outcome(["tasks"])
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    for name in BUILT_IN:
        assert sum(line.split()[0] == name for line in lines) == 1
    assert "width (32)" in stdout
    assert "root (required)" in stdout
    assert "path/to/file.py:function" in stdout
