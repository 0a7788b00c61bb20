"""Fresh environments for tests of the package: built wheels, and installed packages borrowed instead of downloaded."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
_NOT_SOURCE = (".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "runs", ".hypothesis")


def build(folder, kind, *, source=ROOT):
    """Build the wheel or the sdist of a checkout with the tools that are installed; its path."""
    copy = folder / "source"  # a build leaves files beside its sources
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*_NOT_SOURCE))
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


def make_environment(folder):
    """Make an environment with pip and nothing else; its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def site_packages(python):
    """Where an environment keeps its packages."""
    reported = subprocess.run(
        [python, "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(reported.stdout.strip())


def closure(names):
    """The distributions that `names` need, themselves included, as far as they are installed here."""
    found, waiting = {}, list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # an option for another system
            continue
        for text in found[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def borrow(python, names):
    """Link installed distributions and what they need into an environment; their names."""
    target, distributions = site_packages(python), closure(names)
    for distribution in distributions.values():
        source = Path(str(distribution.locate_file("")))
        for top in {Path(str(file)).parts[0] for file in distribution.files or () if not str(file).startswith("..")}:
            link = target / top
            if top != "__pycache__" and not link.exists():
                link.symlink_to(source / top)
    return set(distributions)


def borrow_all(python):
    """Let an environment see all that is installed here; what it has itself comes first."""
    here = Path(str(metadata.distribution("torch").locate_file("")))
    (site_packages(python) / "borrowed.pth").write_text(f"{here}\n")


def installed(python):
    """The names of the distributions in an environment."""
    code = "from importlib.metadata import distributions; print(*{d.metadata['Name'] for d in distributions()})"
    reported = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in reported.stdout.split()}
