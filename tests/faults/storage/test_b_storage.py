"""Section B: whatever disk and processes do, an acknowledged checkpoint is there and a damaged one is never loaded.

B12 needs all replicas, and stands with the trainer's. B16 is shown by tests/checkpoint/test_state.py:
`test_an_optimizer_that_differs_is_refused_with_the_differences`,
`test_a_model_that_differs_is_refused_with_every_difference`, `test_a_tied_checkpoint_does_not_fit_an_untied_model`.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch

from dptrain.checkpoint import store as module
from dptrain.checkpoint.async_writer import AsyncWriter
from dptrain.checkpoint.manifest import MANIFEST, decode_manifest, encode_manifest
from dptrain.checkpoint.store import load_checkpoint, load_newest, save_checkpoint, set_aside
from dptrain.errors import CheckpointError
from tests.checkpoints import STATE, assert_holds, content, save

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def forked(body):
    """Run `body` in a child of its own and return its pid; the child never comes back into pytest."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        body()
        code = 0
    except BaseException:  # noqa: BLE001 -- whatever it was, it is shown
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_b1_no_acknowledged_checkpoint_is_lost_to_sigkill(tmp_path):
    """200 writers killed at random times: each restart finds at least the last step that any of them acknowledged."""
    seeded = random.Random(0)
    acknowledged, reached, num_unacknowledged = 0, [], 0
    for _ in range(200):
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


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("cut", [lambda _: 0, lambda _: 1, lambda n: n // 2, lambda n: n - 1])
def test_b3_a_truncated_file_sends_the_reader_to_the_checkpoint_before(tmp_path, name, cut):
    """Walk-back loads the newest intact one and says what it passed over, why, and how many steps that costs."""
    save(tmp_path, 10)
    newest = save(tmp_path, 25)
    os.truncate(newest / name, cut((newest / name).stat().st_size))
    found = load_newest(tmp_path)
    assert_holds(found, 10)
    ((path, reason),) = found.passed_over
    assert path == newest
    assert name in reason
    assert found.steps_lost == 15


def test_b4_any_flipped_bit_in_any_file_is_detected(tmp_path):
    """10,000 random flips of one bit are 10,000 refusals and nothing worse; the reader then takes the one before."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    files = [(newest / name, (newest / name).read_bytes()) for name in FILES]
    seeded = random.Random(0)
    for trial in range(10_000):
        path, original = seeded.choice(files)
        place = seeded.randrange(len(original))
        with path.open("r+b", buffering=0) as file:
            file.seek(place)
            file.write(bytes([original[place] ^ 1 << seeded.randrange(8)]))
            with pytest.raises(CheckpointError):
                load_checkpoint(newest)
            if trial % 20 == 0:
                assert load_newest(tmp_path).step == 1
            file.seek(place)
            file.write(original[place : place + 1])
    assert_holds(load_newest(tmp_path), 2)


def zero_a_page(path):
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def swap_files(path):
    (path / "model.safetensors").rename(path / "x")
    (path / "optimizer.safetensors").rename(path / "model.safetensors")
    (path / "x").rename(path / "optimizer.safetensors")


def from_another_step(path):
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000000000001"), path)


EXCHANGES = {
    "a page of zeros": (zero_a_page, "the sha256 of model.safetensors"),
    "two files swapped": (swap_files, "bytes and should have"),
    "a file from another step": (
        lambda path: shutil.copy(path.with_name("step-000000000001") / "model.safetensors", path),
        "the sha256 of model.safetensors",
    ),
    "the folder from another step": (from_another_step, "which is not the step in the folder's name"),
    "a file deleted": (lambda path: (path / "state.json").unlink(), "'state.json' is missing"),
    "a file added": (lambda path: (path / "extra").write_text("x"), "'extra' is not in manifest.json"),
}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_b5_what_was_exchanged_is_detected_by_the_manifest(tmp_path, exchange):
    """The reader passes over the damaged one with the reason and loads the one before."""
    for step in (1, 2):
        tensors = {"model": {"w": torch.full((4096,), float(step))}, "optimizer": {"m": torch.ones(10)}}
        save_checkpoint(tmp_path, step=step, tensors=tensors, state={})
    newest = tmp_path / "step-000000000002"
    damage, reason = EXCHANGES[exchange]
    damage(newest)
    found = load_newest(tmp_path)
    assert found.step == 1
    assert reason in found.passed_over[0][1]
    with pytest.raises(CheckpointError, match="step-000000000002 cannot be trusted"):
        load_checkpoint(newest)


def future(path):
    path.write_text('{"format": 2, "dptrain": "9.1.0", "tensors": "somewhere else"}')


def of_another_version(path):
    step, digests = decode_manifest(path.read_bytes())
    path.write_bytes(encode_manifest(step=step, written_by="1", digests=digests).replace(b'"1"', b'"2"'))


MANIFESTS = {
    "missing": (lambda path: path.unlink(), "No such file or directory: 'manifest.json'"),
    "empty": (lambda path: path.write_bytes(b""), "manifest.json is not the JSON"),
    "not JSON": (lambda path: path.write_text("x"), "manifest.json is not the JSON"),
    "huge": (lambda path: path.write_bytes(b" " * (1048576 + 1)), "more than the 1048576 that are written or read"),
    "without a version": (lambda path: path.write_text("{}"), "lacks its format"),
    "of a version that never was": (lambda path: path.write_text('{"format": 0}'), "lacks its format"),
    "of a version changed by hand": (of_another_version, "does not match the checksum that it carries"),
    "of a future version": (future, "written by dptrain '9.1.0' in format 2 and this is dptrain"),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_b6_a_manifest_that_is_not_right_is_passed_over_with_its_reason(tmp_path, kind):
    """Nothing of such a checkpoint is looked at further; a future one says what reads it."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    spoil, reason = MANIFESTS[kind]
    spoil(newest / MANIFEST)
    found = load_newest(tmp_path)
    assert_holds(found, 1)
    assert reason in found.passed_over[0][1]


def test_b7_where_none_is_intact_nothing_begins_afresh_unless_asked(tmp_path):
    """The error gives each one's reason. Told to, the reader finds none, and the bad ones are moved out of the way."""
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-000000000002: .* is missing; step-000000000001: .* is missing"):
        load_newest(tmp_path)
    assert load_newest(tmp_path, allow_fresh=True) is None
    assert len(set_aside(tmp_path)) == 2
    assert load_newest(tmp_path) is None
    save(tmp_path, 1)
    assert_holds(load_newest(tmp_path), 1)
    assert [name[:17] for name in names(tmp_path)] == [".bad-000000000001", ".bad-000000000002", "step-000000000001"]


def test_b7_an_intact_one_is_taken_also_where_a_fresh_start_is_allowed(tmp_path):
    """The permission changes nothing where something can be resumed, and what is intact is not set aside."""
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").unlink()
    assert load_newest(tmp_path, allow_fresh=True).step == 1
    set_aside(tmp_path)
    assert load_newest(tmp_path).passed_over == ()


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


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no second file system here")  # noqa: S108 -- a place that exists everywhere
def test_b10_a_folder_on_another_device_behind_a_link_works(tmp_path):
    """Temporary and final name are on one device, wherever that is."""
    elsewhere = Path("/dev/shm") / f"dptrain-{os.getpid()}"  # noqa: S108 -- the name is this test's own
    elsewhere.mkdir(mode=0o700)
    try:
        (tmp_path / "checkpoints").symlink_to(elsewhere)
        for step in (1, 2):
            save(tmp_path / "checkpoints", step, keep=1)
        assert_holds(load_newest(tmp_path / "checkpoints"), 2)
    finally:
        shutil.rmtree(elsewhere)


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


class SlowDisk:
    """Lets a write through only when it is told to, and knows how many there were at once."""

    def __init__(self, monkeypatch):
        self.begun, self.release, self.num_writers = threading.Event(), threading.Event(), []
        self._writers, self._real = 0, module.save_checkpoint
        monkeypatch.setattr("dptrain.checkpoint.async_writer.save_checkpoint", self._save)

    def _save(self, *arguments, **options):
        self._writers += 1
        self.num_writers.append(self._writers)
        self.begun.set()
        assert self.release.wait(60)
        self._real(*arguments, **options)
        self._writers -= 1


def test_b13_a_slow_disk_does_not_stall_training(tmp_path, monkeypatch):
    """While one save is under way every other is skipped and counted; training pays for copies alone."""
    disk = SlowDisk(monkeypatch)
    with AsyncWriter(tmp_path) as writer:
        began = time.monotonic()
        assert writer.save(step=1, tensors=content(1), state={**STATE, "step": 1})
        assert disk.begun.wait(60)
        assert [writer.save(step=step, tensors=content(step), state={}) for step in (2, 3)] == [False, False]
        assert time.monotonic() - began < 2, "the disk is held until `release`, and nothing waited for it"
        assert (writer.status().committed_step, writer.status().skipped) == (0, 2)
        disk.release.set()
        assert writer.wait()
        assert (writer.status().committed_step, writer.status().skipped) == (1, 2)
        assert writer.save(step=4, tensors=content(4), state={})
    assert disk.num_writers == [1, 1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000000001", "step-000000000004"]


def end_with(how):
    if how == "exit":
        sys.exit(3)
    if how == "error":
        raise ArithmeticError
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("how", ["return", "exit", "error", "interrupt"])
def test_b14_a_save_under_way_is_waited_for_however_the_process_ends(tmp_path, how):
    """Neither an exit nor an exception cuts it short, also where nobody closes the writer."""
    save(tmp_path, 1)

    def body():
        real = module.save_file
        module.save_file = lambda *arguments: (time.sleep(0.2), real(*arguments))
        AsyncWriter(tmp_path).save(step=2, tensors=content(2), state={**STATE, "step": 2})
        end_with(how)

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    while load_newest(tmp_path).step == 1 and process.is_alive():
        assert load_newest(tmp_path).passed_over == (), "what is not committed is not there"
        time.sleep(0.01)
    process.join()
    assert process.exitcode == {"return": 0, "exit": 3}.get(how, 1)
    assert_holds(load_newest(tmp_path), 2)


def test_b14_a_save_under_way_vanishes_with_a_process_that_is_ended_at_once(tmp_path):
    """SIGTERM without a handler: the checkpoint before is the newest, and the next save clears up."""
    save(tmp_path, 1)

    def body():
        module.save_file = lambda *_: end_with("SIGTERM")
        AsyncWriter(tmp_path).save(step=2, tensors=content(2), state={})
        time.sleep(60)

    assert exit_code(forked(body)) == -signal.SIGTERM
    assert_holds(load_newest(tmp_path), 1)
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000000000001", "step-000000000002"]


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


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_b17_a_state_that_is_not_finite_displaces_no_healthy_checkpoint(tmp_path, number):
    """It is refused by name and counted as a failed save, as often as it comes; the first finite one counts again."""
    with AsyncWriter(tmp_path, keep=1) as writer:
        writer.save(step=1, tensors=content(1), state={**STATE, "step": 1})
        for num_failed, step in enumerate((2, 3, 4), start=1):
            writer.wait()
            broken = content(step)
            broken["optimizer"]["exp_avg/w"][3, 1] = number
            writer.save(step=step, tensors=broken, state={})
            writer.wait()
            assert writer.status().failed == num_failed
            assert writer.status().committed_step == 1
            assert "not finite: optimizer/exp_avg/w holds" in writer.status().error
        assert_holds(load_newest(tmp_path), 1)
        writer.save(step=5, tensors=content(5), state={})
        writer.wait()
        assert (writer.status().failed, writer.status().committed_step) == (0, 5)
    assert names(tmp_path) == ["step-000000000005"]
