"""`dptrain train --help` fits a screen, and every setting is explained in the help of its group."""

from __future__ import annotations

import pytest

from dptrain.cli.settings import parse
from dptrain.config.settings_file import setting_types
from tests.cli.test_train import outcome

GROUPS = (
    *("run", "model", "distillation", "sparsity", "execution", "exchange", "optimizer", "early_stopping"),
    *("control", "noise", "checkpoint", "log"),
)


def test_help_fits_a_screen():
    """At most 45 lines of at most 110 columns, the ten common settings first; also after a parse."""
    parse(["--task=digits"])
    code, stdout, stderr = outcome(["train", "--help"])
    lines = stdout.splitlines()
    assert (code, stderr) == (0, "")
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 110
    common = stdout.partition("common settings:")[2].partition("\n\n")[0]
    assert common.count("\n  --") == 10
    for group in GROUPS:
        assert f"--help={group}" in stdout


@pytest.mark.parametrize("form", ["--help={}", "--help {}", "-h {}"])
def test_a_group_lists_its_settings(form):
    """Each with dashes, its whole text and its default, and none of another group."""
    code, stdout, _ = outcome(["train", *form.format("log").split()])
    assert code == 0
    assert "--log.eval-every-samples N" in stdout
    assert "Default: 50." in stdout
    assert "--control." not in stdout


def test_all_settings_are_explained_somewhere():
    """--help=all is the groups together; each setting has a text of its own."""
    _, stdout, _ = outcome(["train", "--help=all"])
    lines = stdout.splitlines()
    for name in setting_types():
        at = next(n for n, line in enumerate(lines) if line.split()[:1] == [f"--{name.replace('_', '-')}"])
        assert lines[at + 1].startswith("      "), name
        assert lines[at + 1].strip(), name
    assert stdout == "".join(outcome(["train", f"--help={group}"])[1] for group in GROUPS)


def test_an_unknown_group_is_refused():
    """With the nearest one."""
    code, _, stderr = outcome(["train", "--help=contrl"])
    assert code == 2
    assert "did you mean control?" in stderr
