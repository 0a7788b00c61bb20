"""No acknowledged checkpoint is lost, and none that was damaged is ever loaded."""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import shutil
import signal
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.errors import CheckpointError, ConfigError
from dptrain.train import checkpoint as module
from dptrain.train.checkpoint import load_checkpoint, load_newest, save_checkpoint
from dptrain.train.manifest import MANIFEST, MAX_JSON_BYTES, Seal, decode_manifest, encode_manifest

STATE = {"cursor": 3, "loss": 0.1, "betas": (0.9, float("inf"))}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def content(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(7, 3, generator=generator), "n": torch.tensor(step)},
        "optimizer": {"exp_avg/w": torch.randn(7, 3, generator=generator)},
    }


def save(folder, step, *, keep=3):
    return save_checkpoint(folder, step=step, tensors=content(step), state={**STATE, "step": step}, keep=keep)


def assert_holds(checkpoint, step):
    assert checkpoint.step == step
    assert checkpoint.state == {**STATE, "step": step}
    for name, group in content(step).items():
        assert_equal_bits(checkpoint.tensors(name), group)


def assert_equal_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        assert found[key].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), key


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [int(name.removeprefix("step-")) for name in names(folder) if name.startswith("step-")]


def reseal(path, **changes):
    """Change a manifest and give it a right checksum again, as somebody with bad intent would."""
    step, seals = decode_manifest((path / MANIFEST).read_bytes())
    values = {"step": step, "written_by": "1", "seals": seals} | changes
    (path / MANIFEST).write_bytes(encode_manifest(**values))


# --- round trip ---


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tensors_round_trip_bit_for_bit(data):
    """Any bits in any dtype and shape come back as they were; saving them again gives equal bytes in every file."""
    group = {}
    for index in range(data.draw(st.integers(0, 3))):
        dtype = data.draw(st.sampled_from(DTYPES))
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        size = torch.empty(shape, dtype=dtype).nbytes
        raw = data.draw(st.binary(min_size=size, max_size=size))
        raw = bytes(byte & 1 for byte in raw) if dtype is torch.bool else raw
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        group[f"t{index}"] = flat.reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        first = save_checkpoint(Path(folder), step=1, tensors={"model": group}, state={})
        loaded = load_checkpoint(first).tensors("model")
        assert_equal_bits(loaded, group)
        second = save_checkpoint(Path(folder) / "again", step=1, tensors={"model": loaded}, state={})
        assert {path.name: path.read_bytes() for path in first.iterdir()} == {
            path.name: path.read_bytes() for path in second.iterdir()
        }


def test_special_floats_survive_in_tensors_and_state(tmp_path):
    """NaN, infinities, -0.0 and subnormals are values like others."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    state = {"special": [float(value) for value in special]}
    path = save_checkpoint(tmp_path, step=0, tensors={"model": {"special": special}}, state=state)
    loaded = load_checkpoint(path)
    assert_equal_bits(loaded.tensors("model"), {"special": special})
    assert_equal_bits({"s": torch.tensor(loaded.state["special"])}, {"s": special})


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    """None is only for "there is none at all"; foreign names count for nothing."""
    assert load_newest(tmp_path / "missing") is None
    for name in ("step-7", "step-x", ".bad-000000000001-ab", "notes"):
        (tmp_path / name).mkdir()
    assert load_newest(tmp_path) is None


def test_a_folder_that_is_a_file_is_an_error(tmp_path):
    """What cannot be listed is not taken for empty, nor written to."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_newest(tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "file", 1)


def test_asking_for_tensors_that_are_not_there_names_those_that_are(tmp_path):
    """A wrong name is told what would have been right."""
    with pytest.raises(CheckpointError, match=r"holds no gone\.safetensors: it holds model\.safetensors, optimizer"):
        load_checkpoint(save(tmp_path, 1)).tensors("gone")


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()])
def test_a_tensor_that_would_not_come_back_is_refused_before_anything_is_written(tmp_path, tensor):
    """A checkpoint that nobody could load is never acknowledged."""
    with pytest.raises(CheckpointError, match="cannot hold 'w'"):
        save_checkpoint(tmp_path, step=1, tensors={"model": {"w": tensor}}, state={})
    assert names(tmp_path) == []


def test_state_beyond_the_limit_is_refused_and_cleaned_up(tmp_path, monkeypatch):
    """The writer keeps the bounds that the reader enforces."""
    monkeypatch.setitem(MAX_JSON_BYTES, "state.json", 100)
    with pytest.raises(CheckpointError, match=r"state\.json has \d+ bytes, more than the 100"):
        save_checkpoint(tmp_path, step=1, tensors={}, state={"a": "x" * 100})
    assert names(tmp_path) == []


# --- damage ---


def test_any_flipped_bit_in_any_file_is_detected(tmp_path):
    """400 random flips, each in a random file, are 400 refusals; the repaired checkpoint loads again."""
    path = save(tmp_path, 1)
    seeded = random.Random(0)  # noqa: S311 -- repeatable, not secret
    for _ in range(400):
        file = seeded.choice(sorted(path.iterdir()))
        original = file.read_bytes()
        flipped = bytearray(original)
        flipped[seeded.randrange(len(flipped))] ^= 1 << seeded.randrange(8)
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        file.write_bytes(original)
    assert_holds(load_checkpoint(path), 1)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("cut", [lambda _: 0, lambda _: 1, lambda n: n // 2, lambda n: n - 1])
def test_a_truncated_file_sends_the_reader_to_the_checkpoint_before(tmp_path, name, cut):
    """Walk-back loads the newest intact one and says what it passed over, and why."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    os.truncate(newest / name, cut((newest / name).stat().st_size))
    found = load_newest(tmp_path)
    assert_holds(found, 1)
    ((path, reason),) = found.passed_over
    assert path == newest
    assert name in reason


def swap_files(path):
    (path / "model.safetensors").rename(path / "x")
    (path / "optimizer.safetensors").rename(path / "model.safetensors")
    (path / "x").rename(path / "optimizer.safetensors")


def to_symlink(path):
    (path / "model.safetensors").rename(path.parent / "elsewhere")
    (path / "model.safetensors").symlink_to(path.parent / "elsewhere")


def to_pipe(path):
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def folder_to_symlink(path):
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def from_another_step(path):
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000000000001"), path)


DAMAGE = {
    "is missing": lambda path: (path / "state.json").unlink(),
    "is not in manifest.json": lambda path: (path / "extra").write_text("x"),
    "bytes and should have": swap_files,
    "the sha256 of model": lambda path: shutil.copy(path.with_name("step-000000000001") / "model.safetensors", path),
    "model.safetensors is not a regular file": to_symlink,
    "safetensors is not a regular file": to_pipe,
    "Not a directory": folder_to_symlink,
    "which is not the step": from_another_step,
    "No such file or directory: 'manifest.json'": lambda path: (path / MANIFEST).unlink(),
    "is not the JSON": lambda path: (path / MANIFEST).write_text("x"),
    "more than the 1048576": lambda path: (path / MANIFEST).write_bytes(b" " * (1048576 + 1)),
    "not a plain file name": lambda path: reseal(path, seals={"../x": Seal(size_bytes=1, sha256="0")}),
    "in format 2": lambda path: (path / MANIFEST).write_text('{"format": 2}'),
    "'state.json' is missing": lambda path: [(path / "state.json").unlink(), reseal(path, seals={})],
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_each_kind_of_damage_is_refused_with_its_reason(tmp_path, reason):
    """The reader passes over the damaged one and loads the one before; alone, the damaged one is an error."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGE[reason](newest)
    found = load_newest(tmp_path)
    assert_holds(found, 1)
    assert reason in found.passed_over[0][1]
    with pytest.raises(CheckpointError, match="step-000000000002 cannot be trusted"):
        load_checkpoint(newest)


def test_a_planted_file_with_right_checksums_is_still_only_safetensors(tmp_path):
    """Checksums do not make a file safe: what is no safetensors is refused, not unpickled, with our own error."""
    path = save(tmp_path, 1)
    header = b'{"w":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'
    for planted in (
        b"",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\xff" * 64,
        len(header).to_bytes(8, "little") + header + b"1234",
    ):
        (path / "model.safetensors").write_bytes(planted)
        seals = decode_manifest((path / MANIFEST).read_bytes())[1]
        reseal(path, seals={**seals, "model.safetensors": module._seal(path / "model.safetensors")})
        with pytest.raises(CheckpointError, match="is not safetensors"):
            load_checkpoint(path).tensors("model")


def test_a_file_that_changes_after_it_was_verified_is_not_parsed(tmp_path):
    """The bytes that become tensors are the bytes that were hashed, not what stood there a moment before."""
    path = save(tmp_path, 1)
    opened = load_checkpoint(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="has changed since it was verified"):
        opened.tensors("model")


def test_when_none_is_intact_the_error_lists_them_all(tmp_path):
    """A run with checkpoints never starts afresh silently."""
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-000000000002: .* is missing; step-000000000001: .* is missing"):
        load_newest(tmp_path)


@pytest.mark.parametrize("damaged", [set(), {3}, {2, 3}, {1, 3}, {1, 2}])
def test_the_newest_intact_one_wins(tmp_path, damaged):
    """For any set of damaged checkpoints the reader returns the greatest intact step."""
    for step in (1, 2, 3):
        path = save(tmp_path, step)
        if step in damaged:
            (path / MANIFEST).unlink()
    assert_holds(load_newest(tmp_path), max({1, 2, 3} - damaged))


# --- saving again ---


def test_an_intact_checkpoint_of_the_same_step_is_never_overwritten(tmp_path):
    """The second save of a step returns the first one, byte for byte as it was."""
    path = save(tmp_path, 1)
    before = {file.name: (file.read_bytes(), file.stat().st_ino) for file in path.iterdir()}
    assert save_checkpoint(tmp_path, step=1, tensors={}, state={"other": True}) == path
    assert {file.name: (file.read_bytes(), file.stat().st_ino) for file in path.iterdir()} == before


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside_and_replaced(tmp_path):
    """Damage is kept as evidence until retention passes it; the step is saved all the same."""
    path = save(tmp_path, 1)
    (path / "state.json").unlink()
    assert save(tmp_path, 1) == path
    assert_holds(load_newest(tmp_path), 1)
    assert [name[:17] for name in names(tmp_path)] == [".bad-000000000001", "step-000000000001"]
    for step in (2, 3):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000000000002", "step-000000000003"]


def test_leftovers_of_dead_attempts_are_removed(tmp_path):
    """A temporary folder, file or link of a killed writer goes; what a link points to stays."""
    (tmp_path / "precious").mkdir()
    (tmp_path / ".tmp-1-abc").mkdir()
    (tmp_path / ".tmp-1-abc" / "model.safetensors").write_text("half")
    (tmp_path / ".tmp-file").write_text("x")
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "precious")
    save(tmp_path, 1)
    assert names(tmp_path) == ["precious", "step-000000000001"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_retention_keeps_the_newest(tmp_path, keep):
    """After every save the newest `keep` are there, and nothing else."""
    for step in range(1, 7):
        save(tmp_path, step, keep=keep)
        assert steps(tmp_path) == list(range(max(1, step - keep + 1), step + 1))


def test_retention_never_counts_a_damaged_checkpoint(tmp_path):
    """With keep=2 and the middle one damaged, the oldest intact one stays."""
    paths = [save(tmp_path, step) for step in (1, 2)]
    os.truncate(paths[1] / "model.safetensors", 5)
    save(tmp_path, 3, keep=2)
    assert steps(tmp_path) == [1, 2, 3]
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [3, 4]


def test_retention_leaves_later_steps_alone(tmp_path):
    """Training again from an earlier step must not delete what was just saved, nor what lies ahead."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 5, keep=1)
    assert steps(tmp_path) == [5, 10, 20, 30]


def test_retention_hashes_a_foreign_checkpoint_once_and_its_own_never(tmp_path, monkeypatch):
    """What this process wrote is known good; what it found is verified one time; a changed file is looked at again."""
    for step in (1, 2):
        save(tmp_path, step)
    module._verdicts.clear()  # as if another process had written them
    opened = []
    real = module._open
    monkeypatch.setattr(module, "_open", lambda path: (opened.append(int(path.name[5:])), real(path))[1])
    for step in (3, 4):
        save(tmp_path, step, keep=9)
    assert opened == [2, 1]
    os.utime(tmp_path / "step-000000000003" / "state.json", (0, 0))
    save(tmp_path, 5, keep=9)
    assert opened == [2, 1, 3]


def test_keep_below_one_is_a_config_error(tmp_path):
    """Retention that could remove everything is refused."""
    with pytest.raises(ConfigError, match="keep must be at least 1, got 0"):
        save(tmp_path, 1, keep=0)


def test_files_are_private_under_any_umask(tmp_path):
    """Neither a lax nor an absurd umask changes the modes: 0600 for files, 0700 for folders."""
    for mask in (0, 0o022, 0o777):
        before = os.umask(mask)
        try:
            path = save(tmp_path / f"made-{mask}", 1)
        finally:
            os.umask(before)
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path, path.parent)} == {0o700}
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


# --- faults of the system ---


def test_the_order_of_system_calls_is_the_one_that_survives_power_loss(tmp_path, monkeypatch):
    """Every file is synced, then the manifest, then the folder; only then rename, sync of the parent, and pruning."""
    save(tmp_path, 1)
    calls = []
    real_fsync, real_rename = os.fsync, os.rename

    def name_of(path):
        name = Path(path).name
        return name[:4] if name[:4] in {".tmp", "step"} else name

    def fsync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        calls.append(f"fsync {'parent' if path == tmp_path else name_of(path)}")
        real_fsync(descriptor)

    def rename(source, target):
        calls.append(f"rename {name_of(source)} {name_of(target)}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 2, keep=1)
    assert calls == [
        "fsync model.safetensors",
        "fsync optimizer.safetensors",
        "fsync state.json",
        "fsync manifest.json",
        "fsync .tmp",
        "rename .tmp step",
        "fsync parent",
        "rename step .tmp",
    ]


@pytest.mark.parametrize("call", ["fsync", "rename", "save_file"])
def test_an_error_of_the_disk_leaves_the_previous_checkpoint_and_no_rubbish(tmp_path, monkeypatch, call):
    """EIO anywhere before the commit is a CheckpointError; the next save works."""
    save(tmp_path, 1)

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(module if call == "save_file" else os, call, fails)
        with pytest.raises(
            CheckpointError, match=r"step-000000000002 could not be written: .*it needs about \d+ bytes and \d+"
        ):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step-000000000001"]
    save(tmp_path, 2)
    assert_holds(load_newest(tmp_path), 2)


def test_a_failure_to_prune_is_a_warning_not_a_lost_checkpoint(tmp_path, monkeypatch):
    """The save that committed is acknowledged even where the old ones cannot be removed."""
    save(tmp_path, 1)

    def fails(_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(module, "_retire", fails)
    with pytest.warns(RuntimeWarning, match="is saved, but older ones"):
        save(tmp_path, 2, keep=1)
    assert_holds(load_newest(tmp_path), 2)


def test_two_saves_at_once_wait_for_each_other(tmp_path, monkeypatch):
    """A second thread does not take the first one's temporary folder for a leftover."""
    inside, real = threading.Event(), module.save_file

    def slow(*arguments):
        inside.set()
        time.sleep(0.1)
        real(*arguments)

    monkeypatch.setattr(module, "save_file", slow)
    first = threading.Thread(target=save, args=(tmp_path, 1))
    first.start()
    assert inside.wait(10)
    save(tmp_path, 2)
    first.join()
    assert steps(tmp_path) == [1, 2]


def forked(body):
    """Run `body` in a child of its own and return its pid; the child never comes back into pytest."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        body()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("budget", [0, 1, 100, 1000, 4000, 8000, 16_383])
def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path, budget):
    """Wherever the bytes run out, the save fails with one sentence, cleans up, and the one before still loads."""
    save(tmp_path, 1)
    large = {"model": {"w": torch.zeros(4096)}}

    def body():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (budget, budget))
        with pytest.raises(
            CheckpointError, match=r"step-000000000002 could not be written: .*File too large.* \d+ are free"
        ):
            save_checkpoint(tmp_path, step=2, tensors=large, state=STATE)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(body), 0)[1]) == 0
    assert names(tmp_path) == ["step-000000000001"]
    assert_holds(load_newest(tmp_path), 1)


def test_no_acknowledged_checkpoint_is_lost_to_sigkill(tmp_path):
    """30 writers killed at random times: each restart finds at least the last step that any of them acknowledged."""
    seeded = random.Random(0)  # noqa: S311 -- repeatable, not secret
    acknowledged, reached = 0, []
    for _ in range(30):
        reader, writer = os.pipe()

        def body(start=acknowledged + 1, writer=writer):
            for step in range(start, start + 1000):
                save(tmp_path, step, keep=2)
                os.write(writer, f"{step}\n".encode())

        pid = forked(body)
        os.close(writer)
        assert select.select([reader], [], [], 30)[0], "the writer never saved anything"
        time.sleep(seeded.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader) as acknowledgements:
            last = int(acknowledgements.read().split()[-1])
        found = load_newest(tmp_path)
        assert found.step in {last, last + 1}
        assert_holds(found, found.step)
        assert found.passed_over == ()
        acknowledged = found.step
        reached.append(last)
    assert reached == sorted(set(reached))
    assert len(steps(tmp_path)) <= 3
    save(tmp_path, acknowledged + 1, keep=2)
    assert len(names(tmp_path)) == 2, "a leftover of a killed writer survived the next save"
