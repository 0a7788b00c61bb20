"""The files round the package: commands, versions, image and licence say what is true."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = """#!/bin/sh
# Stands in for Python: makes an environment of fake commands that print their calls, and passes the version check.
case "$2" in
  venv)
    mkdir -p .venv/bin
    for name in python dptrain ruff mypy; do
      printf '#!/bin/sh\\necho "[%s] $*"\\n' "$name" > ".venv/bin/$name"
      chmod +x ".venv/bin/$name"
    done ;;
esac
"""


def _lines(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def checkout(tmp_path):
    """The Makefile in a folder whose name has a space, with a fake Python: nothing is downloaded."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    (folder / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    (folder / "constraints.txt").write_text("torch==1\n")
    (folder / "pyproject.toml").write_text("")
    python = folder / "fake-python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return folder


def _make(folder, *arguments):
    bare = {"PATH": "/usr/local/bin:/usr/bin:/bin"}  # a make round the tests hands its own settings down
    command = ["make", "PYTHON=./fake-python", *arguments]
    return subprocess.run(command, cwd=folder, env=bare, capture_output=True, text=True, check=True).stdout


def test_make_train_installs_once_and_passes_arguments_on(checkout):
    """The first call makes the environment from the constraints; the second only trains."""
    first, second = (_make(checkout, "train", "ARGS=--seed 3") for _ in range(2))
    assert "[python] -m pip install -c constraints.txt -e .[dev]" in first
    assert "pip install" not in second
    assert second.endswith("[dptrain] train --seed 3\n")


def test_a_change_of_the_constraints_installs_anew(checkout):
    """Newer constraints, and none at all, are each a reason to install; without them the newest are asked for."""
    _make(checkout, "env")
    newer = (checkout / ".venv" / "ready-constraints.txt").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (newer, newer))
    assert "-c constraints.txt" in _make(checkout, "env")
    newest = _make(checkout, "test", "CONSTRAINTS=")
    assert "[python] -m pip install --upgrade --upgrade-strategy eager -e .[dev]" in newest
    assert newest.endswith("[python] -m pytest\n")
    assert "-c constraints.txt" in _make(checkout, "env")


def test_make_check_runs_format_lint_types_and_tests(checkout):
    """The one gate holds all four, in the order of what is quick."""
    calls = [line for line in _make(checkout, "check").splitlines() if line.startswith("[") and "pip" not in line]
    assert calls == ["[ruff] format --check .", "[ruff] check .", "[mypy] ", "[python] -m pytest"]


def test_make_alone_lists_every_command(checkout):
    """Each target is in the help with a word of what it does."""
    phony = next(line for line in _lines("Makefile") if line.startswith(".PHONY:")).split()[1:]
    listed = re.findall(r"^make (\w+) +\S", _make(checkout), flags=re.MULTILINE)
    assert sorted(listed) == sorted(phony)


def test_clean_keeps_the_runs(checkout):
    """What was trained is no cache."""
    _make(checkout, "env")
    (checkout / "runs").mkdir()
    _make(checkout, "clean")
    assert (checkout / "runs").is_dir()
    assert not (checkout / ".venv").exists()


def test_an_old_python_gets_one_sentence():
    """Python 3.10 is refused before anything is made, with the setting that helps."""
    (check,) = (line for line in _lines("Makefile") if "sys.version_info" in line)
    code = re.search(r"-c '(.*)'$", check).group(1)
    old = f'import sys; sys.version_info = (3, 10); sys.version = "3.10.2 (x)"; {code}'
    result = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "dptrain needs Python 3.11 or newer, this is 3.10.2: make PYTHON=/path/to/newer/python\n"


def test_every_constraint_is_one_exact_public_version():
    """`name==version` and nothing else: no address, no build that only one machine has."""
    head, *pins = _lines("constraints.txt")
    assert "make test CONSTRAINTS=" in head
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin)] == []


def test_every_dependency_has_its_constraint():
    """What pyproject.toml asks for is pinned, the development tools too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for names in project["optional-dependencies"].values() for name in names),
    ]
    names = {_canonical(re.match(r"[A-Za-z0-9._-]+", text).group()) for text in wanted} - {"dptrain"}
    assert names - {_canonical(pin.split("==")[0]) for pin in _lines("constraints.txt")} == set()


def test_ci_runs_make_check():
    """CI has no command of its own that a laptop would not run."""
    assert _lines(".ci/run")[-1].endswith("make check")


def test_the_image_is_not_root_and_copies_what_exists():
    """The last user is not root, each copied path is in the checkout, and .dockerignore lets it in."""
    steps = [line.split() for line in _lines("Dockerfile")]
    users = [step[1] for step in steps if step[:1] == ["USER"]]
    copied = [source for step in steps if step[:1] == ["COPY"] for source in step[1:-1]]
    assert users
    assert users[-1] not in {"root", "0"}
    assert copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {f"!{source.removeprefix('./')}" for source in copied} <= set(_lines(".dockerignore"))


def test_the_licence_is_the_one_that_the_package_declares():
    """LICENSE is the whole Apache text, and pyproject.toml says so."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_example_of_a_controller_runs(tmp_path):
    """The law in docs/extending.md is code that works behind the limits, as the page says."""
    from dptrain.control import BatchSizeGrid, Measurement, OnGrid
    from dptrain.noise import noise_scale

    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    law = runpy.run_path(str(script))["DoubleEvery"](first=16, num_samples=100)
    controller = OnGrid(law, BatchSizeGrid(quantum=16, largest=64))
    known = {"global_batch_size": 16, "noise_scale": noise_scale(None)}
    state, decision = controller.update(controller.init(), Measurement(samples_seen=250, **known))
    assert decision.global_batch_size == law.decide(Measurement(samples_seen=250, **known)).global_batch_size == 64
    assert controller.restore({}) == state


def test_every_path_named_in_the_pages_exists():
    """A page that sends its reader to a file sends them to one that is there."""
    pages = ["docs/extending.md", "launch/README.md"]
    named = {
        path
        for page in pages
        for path in re.findall(r"`((?:dptrain|tests|launch|docs)/[\w./]+)`", "\n".join(_lines(page)))
    }
    assert "dptrain/control/base.py" in named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
