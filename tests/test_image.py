"""The Dockerfile's steps, replayed in a root file system of their own: each RUN works, and the entry point trains."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.version.cuda else "cpu"

pytestmark = pytest.mark.timeout(1500)  # it installs torch anew: 50 s of CPU time


def instructions():
    """The Dockerfile as (word, rest), continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def value_of(word):
    """What follows the last instruction of a kind."""
    return [rest for found, rest in instructions() if found == word][-1]


class RootFileSystem:
    """This machine's files under a layer that takes all changes, with a fresh Python environment first on PATH.

    It stands in for the base image: the same interpreter, nothing installed.
    """

    def __init__(self, folder):
        self._layers = {name: folder / name for name in ("upper", "work", "root")}
        for layer in self._layers.values():
            layer.mkdir()
        self.root = self._layers["root"]
        mount = (
            f"mount -t overlay image -o lowerdir=/,upperdir={self._layers['upper']},workdir={self._layers['work']} "
            f"{self.root} && mount --rbind /proc {self.root}/proc && mount --rbind /dev {self.root}/dev "
            "&& echo ready && exec sleep infinity"
        )
        unshare = shutil.which("unshare") or "unshare"
        self._holder = subprocess.Popen(
            [unshare, "--mount", "sh", "-c", mount], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.works = self._holder.stdout.readline() == "ready\n"
        self.variables = {"PATH": "/base/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin", "HOME": "/root"}
        self.variables |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.directory, self.user = "/", "0"

    def run(self, command, **variables):
        """Run a command of the shell as the user, in the directory and with the variables of the image so far."""
        return subprocess.run(
            [
                *(shutil.which("nsenter") or "nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"),
                *("chroot", f"--userspec={self.user}", str(self.root)),
                *("/bin/sh", "-c", f"cd {shlex.quote(self.directory)} && {command}"),
            ],
            env=self.variables | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    def copy(self, rest):
        """Copy files of the checkout, as COPY does."""
        *sources, target = rest.split()
        into = target if target.startswith("/") else f"{self.directory}/{target}"
        for source in sources:
            path = ROOT / source
            contents = f"{path}/." if path.is_dir() else str(path)
            made = self.run(f"mkdir -p {into if path.is_dir() or into.endswith('/') else Path(into).parent}")
            assert made.returncode == 0, made.stderr
            copied = self.run(f"cp -r {shlex.quote(contents)} {into}")
            assert copied.returncode == 0, copied.stderr

    def close(self):
        self._holder.kill()
        self._holder.wait()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The image after its last instruction."""
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("needs root and util-linux")
    found = RootFileSystem(tmp_path_factory.mktemp("image"))
    try:
        if not found.works:
            pytest.skip(f"the kernel refuses an overlay: {found._holder.stderr.read().strip()}")
        made = found.run(
            f"{shlex.quote(sys.executable)} -m venv /base && rm -rf /home/dptrain && userdel dptrain; true"
        )
        assert made.returncode == 0, made.stderr
        for word, rest in instructions():
            if word == "ARG":
                found.variables[rest.partition("=")[0]] = shlex.split(rest.partition("=")[2])[0]
                found.variables |= {"DEVICE": DEVICE} if rest.startswith("DEVICE") else {}
            elif word == "WORKDIR":
                found.directory = rest
                found.run(f"mkdir -p {rest}") if not (found.root / rest[1:]).exists() else None
            elif word == "USER":
                found.user, found.variables["HOME"] = rest, "/home/dptrain"
            elif word == "COPY":
                found.copy(rest)
            elif word == "RUN":
                done = found.run(rest)
                assert done.returncode == 0, f"RUN {rest}\n{done.stdout}{done.stderr}"
        yield found
    finally:
        found.close()


def test_the_entry_point_trains_as_an_ordinary_user(image):
    """`dptrain train --task digits` runs as user 1000 from the installed package, and keeps its run in the volume."""
    entry = shlex.join(json.loads(value_of("ENTRYPOINT")))
    settings = "--task digits --max-samples 1500 --device cpu --log.tracker none --run-dir runs/a"
    done = image.run(f"id -u && {entry} train {settings}", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1000\n")
    assert image.run("ls runs/a/summary.json runs/a/report.html").returncode == 0
    where = image.run("cd / && python -c 'import dptrain; print(dptrain.__file__)'").stdout
    assert where.startswith("/base/")


def test_a_mounted_task_file_is_found(image):
    """A task file that is put beside the runs is one that the entry point trains."""
    task = (ROOT / "dptrain" / "tasks" / "digits.py").read_text()
    assert "def " in task
    put = image.run("cat > task.py <<'TASK'\nfrom dptrain.tasks.digits import *\nTASK")
    assert put.returncode == 0, put.stderr
    name = re.search(r"^def (\w+)\(", task, flags=re.MULTILINE).group(1)
    done = image.run(f"dptrain train --task task.py:{name} --max-samples 600 --device cpu --log.tracker none")
    assert done.returncode == 0, done.stderr


def test_several_machines_start_by_the_script_in_the_image(image):
    """`dptrain-torchrun` is there, may be run by the user, and refuses what cannot work in one sentence."""
    done = image.run("dptrain-torchrun", NPROC="1", NNODES="2", NODE_RANK="0")
    assert done.returncode == 2
    assert "HEAD must name the node" in done.stderr


def test_the_build_fails_for_the_wrong_device(image):
    """A torch that is not built for what DEVICE says ends the build with the remedy."""
    (step,) = [rest for word, rest in instructions() if word == "RUN" and "torch.version.cuda" in rest]
    check = step.partition("&& ")[2]
    wrong = {"cpu": "cuda", "cuda": "cpu"}[DEVICE]
    done = image.run(check, DEVICE=wrong)
    assert done.returncode == 1
    assert f"DEVICE is {wrong}, but this torch" in done.stderr
    assert image.run(check).returncode == 0


def test_the_health_check_knows_a_run_that_hangs(image):
    """No heartbeat and a fresh one are healthy; one of this container that stopped ten minutes ago is not."""
    _, check = value_of("HEALTHCHECK").split("CMD ")
    command = shlex.join(json.loads(check))
    old, fresh = "touch -d '-20 minutes' runs/heartbeat.json", "touch runs/heartbeat.json"
    assert image.run(f"rm -f runs/heartbeat.json; {command}").returncode == 0
    assert image.run(f"{fresh}; {command}").returncode == 0
    image.user = "0"
    started = image.run("touch -d '-1 hour' /etc/hostname")
    image.user = "1000"
    assert started.returncode == 0, started.stderr
    assert image.run(f"{old}; {command}").returncode != 0
    assert image.run(f"touch -d '-2 hours' runs/heartbeat.json; {command}").returncode == 0
    image.run("rm runs/heartbeat.json")


def test_the_constraints_are_for_the_images_python():
    """The base image has the Python that constraints.txt was tested with."""
    tested = re.search(r"\(Python (\d+\.\d+)", (ROOT / "constraints.txt").read_text()).group(1)
    assert value_of("FROM") == f"python:{tested}-slim"
