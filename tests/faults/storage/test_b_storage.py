"""Section B: whatever disk and processes do, an acknowledged checkpoint is there and a damaged one is never loaded.

B12 needs all replicas, and stands with the trainer's. B16 is shown by tests/checkpoint/test_state.py:
`test_an_optimizer_that_differs_is_refused_with_the_differences`,
`test_a_model_that_differs_is_refused_with_every_difference`, `test_a_tied_checkpoint_does_not_fit_an_untied_model`.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from dptrain.checkpoint import store as module
from dptrain.checkpoint.async_writer import AsyncWriter
from dptrain.checkpoint.store import load_checkpoint, load_newest, save_checkpoint
from dptrain.errors import CheckpointError
from tests.checkpoints import STATE, assert_holds, content, names, save
from tests.faults.storage.forked import exit_code, forked


def test_b1_no_acknowledged_checkpoint_is_lost_to_sigkill(tmp_path):
    """Writers killed at random times: each restart finds at least the last step that any of them acknowledged."""
    seeded = random.Random(0)
    acknowledged, reached, num_unacknowledged = 0, [], 0
    for _ in range(60):  # `benchmarks.faults` has 200
        reader, writer = os.pipe()

        def body(start=acknowledged + 1, writer=writer):
            for step in range(start, start + 1000):
                save(tmp_path, step, keep=2)
                os.write(writer, f"{step}\n".encode())

        pid = forked(body)
        os.close(writer)
        assert select.select([reader], [], [], 30)[0], "the writer never saved anything"
        time.sleep(seeded.random() * 0.02)
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL
        with os.fdopen(reader) as acknowledgements:
            last = int(acknowledgements.read().split()[-1])
        found = load_newest(tmp_path)
        assert found.step in {last, last + 1}
        assert_holds(found, found.step)
        assert found.passed_over == ()
        num_unacknowledged += found.step > last
        acknowledged = found.step
        reached.append(last)
    assert reached == sorted(set(reached))
    save(tmp_path, acknowledged + 1, keep=2)
    assert len(names(tmp_path)) == 2, "a leftover of a killed writer survived the next save"


FULL_DISK = """
import shutil, subprocess, sys
from pathlib import Path
import torch
from dptrain.errors import CheckpointError
from dptrain.checkpoint.store import load_newest, save_checkpoint

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
folder, tensors = disk / "checkpoints", {"model": {"w": torch.ones(50_000)}}
save_checkpoint(folder, step=1, tensors=tensors, state={})
room, refused = shutil.disk_usage(disk).free, []
for num_pages in range(50):
    (disk / "filler").write_bytes(bytes(room - 4096 * num_pages))
    try:
        save_checkpoint(folder, step=2, tensors=tensors, state={})
    except CheckpointError as error:
        refused.append(num_pages)
        assert f"checkpoint {folder}/step-000000000002 could not be written" in str(error), error
        assert f"needs about 200002 bytes and {4096 * num_pages} are free" in str(error), error
    assert [path.name for path in folder.iterdir()] == ["step-000000000001"]
    assert load_newest(folder).tensors("model")["w"].sum() == 50_000
    (disk / "filler").unlink()
save_checkpoint(folder, step=2, tensors=tensors, state={})
assert load_newest(folder).step == 2
print(refused)
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode != 0,
    reason="the kernel allows no user namespace to mount a small disk in",
)
def test_b2_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path):
    """A disk of 1 MB with 0 to 49 pages left: one sentence with the bytes, no rubbish, the one before still loads."""
    command = ["unshare", "-Urm", sys.executable, "-c", FULL_DISK, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{list(range(50))}\n"


def test_b2_a_file_size_limit_leaves_the_previous_checkpoint_intact(tmp_path):
    """At 50 budgets from no byte to all but one, and SIGXFSZ, which Python ignores, does not end the process (H11)."""
    save(tmp_path, 1)
    large = {"model": {"w": torch.zeros(4096)}}

    def body():
        assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for part in range(50):
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_383 * part // 49, hard))
            with pytest.raises(
                CheckpointError, match=r"step-000000000002 could not be written: .*File too large.* \d+ are free"
            ):
                save_checkpoint(tmp_path, step=2, tensors=large, state=STATE)
            assert names(tmp_path) == ["step-000000000001"]
            assert_holds(load_newest(tmp_path), 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        save_checkpoint(tmp_path, step=2, tensors=large, state=STATE)

    assert exit_code(forked(body)) == 0
    assert load_newest(tmp_path).step == 2


def eio(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(
    ("owner", "call"), [(module, "save_file"), (Path, "write_bytes"), (os, "mkdir"), (os, "rename")]
)
def test_b8_an_error_of_the_disk_is_a_failed_save(tmp_path, monkeypatch, owner, call):
    """EIO anywhere before the commit leaves the checkpoint before and no rubbish; the next save works."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, eio)
        with pytest.raises(
            CheckpointError, match=r"step-000000000002 could not be written: .*needs about \d+ bytes and \d+"
        ):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-000000000001"]
    save(tmp_path, 2)
    assert_holds(load_newest(tmp_path), 2)


@pytest.mark.parametrize("failing", range(6))
def test_b8_an_fsync_that_failed_once_is_not_asked_again(tmp_path, monkeypatch, failing):
    """Each of the six syncs of a save fails once and would succeed the second time: the save fails, and starts over."""
    save(tmp_path, 1)
    asked, real = [], os.fsync

    def fsync(descriptor):
        asked.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        if len(asked) == failing + 1:
            eio()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path, 2)
    assert len(asked) == failing + 1, "after a sync that failed there is no other in the same save"
    assert names(tmp_path) == ["step-000000000001"]
    assert load_newest(tmp_path).step == 1
    save(tmp_path, 2)
    assert len(asked) == failing + 1 + 6, "the second save writes and syncs everything anew"
    assert_holds(load_newest(tmp_path), 2)


def test_b9_the_order_of_system_calls_is_the_one_that_survives_power_loss(tmp_path, monkeypatch):
    """Every file is synced, then the manifest, then the folder; only then rename, sync of the parent, and pruning."""
    save(tmp_path, 1)
    calls = []

    def name_of(path):
        name = Path(path).name
        return "parent" if Path(path) == tmp_path else name[:4] if name[:4] in {".tmp", "step"} else name

    def recorded(verb, owner, call, name):
        real = getattr(owner, call)

        def record(*arguments, **options):
            calls.append(f"{verb} {name(*arguments)}")
            return real(*arguments, **options)

        monkeypatch.setattr(owner, call, record)

    recorded("fsync", os, "fsync", lambda descriptor: name_of(Path(f"/proc/self/fd/{descriptor}").readlink()))
    recorded("rename", os, "rename", lambda source, target: f"{name_of(source)} {name_of(target)}")
    recorded("write", module, "save_file", lambda _, path: name_of(path))
    recorded("write", Path, "write_bytes", lambda path, _: name_of(path))
    recorded("delete", shutil, "rmtree", name_of)
    save(tmp_path, 2, keep=1)
    assert calls == [
        "write model.safetensors",
        "fsync model.safetensors",
        "write optimizer.safetensors",
        "fsync optimizer.safetensors",
        "write state.json",
        "fsync state.json",
        "write manifest.json",
        "fsync manifest.json",
        "fsync .tmp",
        "rename .tmp step",
        "fsync parent",
        "rename step .tmp",
        "delete .tmp",
    ]


def test_b10_a_folder_without_permission_is_found_before_training():
    """Who may not write there learns it from the probe; a save that meets it later is a failed save."""
    with tempfile.TemporaryDirectory() as place:  # not below a folder that only its owner may enter
        folder = Path(place) / "checkpoints"
        save(folder, 1)
        Path(place).chmod(0o755)
        folder.chmod(0o555)

        def body():
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)  # root may write anywhere
            with pytest.raises(CheckpointError, match=r"no checkpoint can be written to .*Permission denied"):
                AsyncWriter(folder)
            with pytest.raises(CheckpointError, match=r"could not be written: .*Permission denied"):
                save(folder, 2)

        assert exit_code(forked(body)) == 0
        folder.chmod(0o700)
        assert names(folder) == ["step-000000000001"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_b10_a_path_that_is_a_file_is_found_before_training(tmp_path, below):
    """As the folder itself, and on the way to it."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="no checkpoint can be written"):
        AsyncWriter(tmp_path / "file" / below)


def test_b10_a_folder_that_was_removed_during_the_run_is_made_again(tmp_path):
    """The save after that is a save like others."""
    with AsyncWriter(tmp_path / "checkpoints") as writer:
        for step in (1, 2):
            writer.save(step=step, tensors=content(step), state={**STATE, "step": step})
            writer.wait()
            assert writer.status().committed_step == step
            assert_holds(load_newest(tmp_path / "checkpoints"), step)
            shutil.rmtree(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["with a space", "größe-φ", "new\nline", "-rf", "%s{0}"])
def test_b10_any_name_will_do(tmp_path, name):
    """Spaces, letters of any language, and what shells and formats mean something by."""
    save(tmp_path / name, 1)
    assert_holds(load_newest(tmp_path / name), 1)


def test_b10_a_folder_on_another_device_behind_a_link_works(tmp_path, on_disk):
    """Temporary and final name are on one device, wherever that is."""
    if tmp_path.stat().st_dev == on_disk.stat().st_dev:
        pytest.skip("no second file system here")
    (tmp_path / "checkpoints").symlink_to(on_disk)
    for step in (1, 2):
        save(tmp_path / "checkpoints", step, keep=1)
    assert_holds(load_newest(tmp_path / "checkpoints"), 2)


def test_b11_leftovers_of_dead_attempts_at_the_same_step_are_removed(tmp_path):
    """A temporary folder, file or link goes and the step is saved; what a link points to stays."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".tmp-1-abc").mkdir()
    (tmp_path / ".tmp-1-abc" / "model.safetensors").write_text("half")
    (tmp_path / ".tmp-file").write_text("x")
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "precious")
    save(tmp_path, 1)
    assert names(tmp_path) == ["precious", "step-000000000001"]
    assert names(tmp_path / "precious") == ["file"]


MUTATIONS = [
    *((module, "save_file"), (Path, "write_bytes")),
    *((os, call) for call in ("mkdir", "chmod", "fsync", "rename", "unlink", "rmdir")),
]


def killed_at(folder, *, point, after):
    """Save step 3 over step 2 with keep=1 and be killed right before or after the given change of the disk."""
    num_changes = itertools.count()

    def deadly(real):
        def change(*arguments, **options):
            here = next(num_changes) == point
            if here and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return change

    for owner, call in MUTATIONS:
        setattr(owner, call, deadly(getattr(owner, call)))
    save(folder, 3, keep=1)


@pytest.mark.parametrize("after", [False, True])
def test_b15_with_keep_1_a_verified_checkpoint_survives_a_kill_at_any_point(tmp_path, after):
    """Before and after every single change that a save makes to the disk, down to the last unlink of pruning."""
    save(tmp_path / "template", 2)
    found = []
    for point in range(1000):
        folder = tmp_path / f"at-{point}"
        shutil.copytree(tmp_path / "template", folder)
        code = exit_code(forked(lambda folder=folder, point=point: killed_at(folder, point=point, after=after)))
        newest = load_newest(folder)
        assert_holds(newest, newest.step)
        for path in folder.glob("step-*"):
            load_checkpoint(path)  # never half a checkpoint under that name, neither made nor removed
        found.append(newest.step)
        save(folder, 4, keep=1)
        assert names(folder) == ["step-000000000004"], "the next save clears up"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert len(found) > 20
    assert found == sorted(found)
    assert {2, 3} == set(found)
