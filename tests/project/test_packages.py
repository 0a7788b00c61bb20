"""The wheel and the sdist: what they hold, what they need, and that they train from an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tomllib
import zipfile

import pytest

from tests.project.packaging import ROOT, borrow, borrow_all, build, installed, make_environment

MINIMAL_LOOP = """
import dptrain, torch
from torch import nn
model = nn.Linear(4, 1)
meter = dptrain.attach(model)
for _ in range(4):
    for _ in range(2):
        (model(torch.randn(8, 4)).square().mean() / 2).backward()
    print(meter.step().noise_scale)
    model.zero_grad()
batch = dptrain.ElasticBatch(global_batch_size=8, micro_batch_size=2)
print(len(batch.micro_batches(rank=0, world_size=2)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sdist"), "sdist")


def run(python, *arguments, cwd):
    """Run something in an environment that knows nothing of this checkout."""
    variables = {name: os.environ[name] for name in ("HOME", "TMPDIR") if name in os.environ}
    path = f"{python.parent}:/usr/local/bin:/usr/bin:/bin"
    return subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**variables, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def install(python, package, *options):
    """Install a package with what is there already: nothing is downloaded."""
    done = run(python, "-m", "pip", "install", "--quiet", "--no-index", *options, str(package), cwd="/")
    assert done.returncode == 0, done.stderr


def test_with_torch_numpy_and_scipy_alone_it_measures(wheel, tmp_path):
    """The package adds itself to an environment with these three; a loop measures, a command names its extra."""
    python = make_environment(tmp_path / "env")
    before = borrow(python, ["torch", "numpy", "scipy"]) | installed(python)
    install(python, wheel)
    assert installed(python) - before == {"dptrain"}
    assert "psutil" not in installed(python)
    measured = run(python, "-c", MINIMAL_LOOP, cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert measured.stdout.splitlines()[-1] == "2"
    for command in ("train", "doctor", "plan", "report", "sweep"):
        refused = run(python, "-m", "dptrain", command, cwd=tmp_path)
        assert refused.returncode == 2, (command, refused.stderr)
        assert re.fullmatch(
            rf"dptrain {command} needs the package \w+, which is not installed: "
            r"pip install 'dptrain\[(train|report)\]'\n",
            refused.stderr,
        ), refused.stderr


def test_the_wheel_trains_from_an_empty_folder(wheel, tmp_path):
    """Installed from the wheel alone, `dptrain train --task digits` makes its run in the folder where it is called."""
    python = make_environment(tmp_path / "env")
    borrow_all(python)
    install(python, wheel, "--no-deps")
    folder = tmp_path / "empty"
    folder.mkdir()
    settings = ("--task", "digits", "--max_samples", "2000", "--device", "cpu", "--log.tracker", "none")
    done = run(python.parent / "dptrain", "train", *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (folder / "runs").iterdir()
    assert (run_dir / "summary.json").exists()
    assert (run_dir / "report.html").exists()
    where = run(python, "-c", "import dptrain; print(dptrain.__file__)", cwd=folder).stdout
    assert str(tmp_path) in where


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    """Every file of the package is in the wheel, with its marker for types, and no test or benchmark is."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    ours = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dptrain").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == ours
    assert "dptrain/py.typed" in names


def test_the_sdist_holds_what_its_readme_links(sdist):
    """Each file that README.md sends its reader to is in the sdist, and so are the licence and the checks' files."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    links = re.findall(r"\]\(([^)#:\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if link.rstrip("/") not in names] == []
    for needed in ("LICENSE", "constraints.txt", "Dockerfile", "launch/torchrun.sh", "tests/project/test_packages.py"):
        assert needed in names


def test_the_wheel_can_be_built_from_the_sdist(sdist, wheel, tmp_path):
    """Unpacked elsewhere, the sdist builds a wheel with the same files."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    rebuilt = build(tmp_path / "dist", "wheel", source=source)
    assert zipfile.ZipFile(rebuilt).namelist() == zipfile.ZipFile(wheel).namelist()


def test_every_extra_is_part_of_the_development_environment():
    """`make env` brings all extras (vision, its weights and fp8 into folders apart), so that no test lacks one."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (all_of_them,) = re.findall(r"dptrain\[(.*?)\]", " ".join(extras["dev"]))
    assert set(all_of_them.split(",")) == set(extras) - {"dev", "vision", "efficientnet", "fp8"}
