"""The `dptrain` command: sub-commands, exit codes, and that each error is a sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import dptrain
from dptrain.cli import main as command
from dptrain.cli.main import main
from dptrain.errors import (
    AbortedError,
    CheckpointError,
    ConfigError,
    DesyncError,
    DivergedError,
    DptrainError,
    MismatchError,
    ObservationError,
    PeerLostError,
    RendezvousError,
    TaskError,
)
from dptrain.runtime.signals import EXIT_HUNG, EXIT_RESUMABLE


def test_help_names_every_command(capsys):
    """Asked for, it is the answer; with nothing to do it is the complaint."""
    assert main(["--help"]) == main(["-h"]) == 0
    assert main([]) == 2
    text = capsys.readouterr().out
    assert "train " in text
    assert "report " in text
    assert "export " in text


def test_help_tells_every_exit_code(capsys):
    """Those of errors, and those that have none: done, crashed, hung, stopped."""
    main(["--help"])
    reported = {
        int(code) for code in re.findall(r"(?:^|\s)(\d+)  +\w", capsys.readouterr().out.partition("exit codes:")[2])
    }
    assert reported == {code for _, code in command._EXIT_CODES} | {0, 1, EXIT_HUNG, EXIT_RESUMABLE}


def test_version(capsys):
    """It is the package's."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dptrain {dptrain.__version__}\n"


@pytest.mark.parametrize("name", ["trian", "--train", "runs/x"])
def test_an_unknown_command_is_refused(name, capsys):
    """With the names of those that exist."""
    assert main([name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dptrain: unknown command {name!r}")
    assert err.endswith("(commands: train, tasks, bench, report, plan, sweep, branch, export, doctor)\n")
    assert ("did you mean train?" in err) == (name != "runs/x")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (ConfigError, 2),
        (TaskError, 2),
        (ObservationError, 70),
        (AbortedError, 70),
        (PeerLostError, 70),
        (DivergedError, 65),
        (RendezvousError, 69),
        (DptrainError, 70),
        (CheckpointError, 74),
        (MismatchError, 2),
        (DesyncError, 76),
    ],
)
def test_each_error_is_a_sentence_and_has_a_code(kind, code, monkeypatch, capsys):
    """A scheduler can tell by the code whether another attempt makes sense."""

    def fail(_arguments):
        raise kind("something is wrong")

    monkeypatch.setattr(command, "_command", lambda _: fail)
    assert main(["train"]) == code
    assert capsys.readouterr().err == "dptrain train: something is wrong\n"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    """What nobody foresaw is not made to look as if it had been."""

    def fail(_arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(command, "_command", lambda _: fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


@pytest.mark.parametrize(("kind", "code"), [(CheckpointError, 74), (ZeroDivisionError, 1)])
def test_a_replica_leaves_its_error_to_the_launcher(kind, code, monkeypatch, capsys, tmp_path):
    """Foreseen or not, with the same exit code; it prints nothing, so that nothing is printed twice."""

    def fail(_arguments):
        raise kind("something is wrong")

    monkeypatch.setattr(command, "_command", lambda _: fail)
    monkeypatch.setenv("DPTRAIN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RANK", "1")
    assert main(["train"]) == code
    assert capsys.readouterr() == ("", "")
    assert "something is wrong" in json.loads((tmp_path / "replica-1.json").read_text())["sentence"]


def test_the_package_runs_as_a_module(tmp_path):
    """`python -m dptrain` is the command, exit code included."""
    found = subprocess.run(
        [sys.executable, "-m", "dptrain", "trian"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert "unknown command 'trian'" in found.stderr


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    """`dptrain train` without jsonargparse says what to install, and ends with the code of wrong settings."""
    for name in [name for name in sys.modules if name.startswith(("dptrain.cli.settings", "dptrain.cli.train"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert command.main(["train"]) == 2
    assert "pip install 'dptrain[train]'" in capsys.readouterr().err
