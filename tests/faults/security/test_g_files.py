"""Section G, files: what somebody planted in a run folder runs nothing, leads nowhere and takes no memory.

G1, G3, G4 and G6. That a manifest of any other name is refused is shown by tests/checkpoint/test_manifest.py:
`test_a_name_that_is_no_plain_basename_is_refused`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import socket
import stat
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from dptrain.checkpoint import store as module
from dptrain.checkpoint.async_writer import AsyncWriter
from dptrain.checkpoint.manifest import MANIFEST, PLAIN_NAME, FileDigest, decode_manifest, encode_manifest
from dptrain.checkpoint.store import load_checkpoint, load_newest, save_checkpoint
from dptrain.cli.export import export
from dptrain.cli.settings import parse
from dptrain.errors import CheckpointError, DptrainError
from dptrain.explain.record import read_run
from dptrain.tracking.jsonl import JsonlLog
from dptrain.tracking.run_folder import write_config
from dptrain.train import TrainConfig


def save(folder, step=1):
    tensors = {"model": {"w": torch.full((5,), float(step))}, "optimizer": {"m": torch.ones(5)}}
    return save_checkpoint(folder, step=step, tensors=tensors, state={"step": step})


def rewrite_manifest(path, **changes):
    """Give a checkpoint's manifest right sums for what is in the folder now, as somebody with bad intent would."""
    step, digests = decode_manifest((path / MANIFEST).read_bytes())
    digests = {name: module.sync_and_digest(path / name) for name in digests} | changes
    (path / MANIFEST).write_bytes(encode_manifest(step=step, written_by="1", digests=digests))


def forked(body):
    """Run `body` in a child and return what it returns, a number below 128."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 255
    try:
        code = body()
    finally:
        os._exit(code)


# --- G1 ---


class Runs:
    """What unpickles by calling."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def legacy_tar(payload):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    return file.getvalue()


def torch_zip(payload):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def payloads(marker):
    """Bytes that make the file `marker` when they are unpickled, in the forms that torch has read so far."""
    command = f"touch {marker}"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    inner = pickle.dumps(Runs(os.system, command))
    return {
        "os.system": inner,
        "eval": pickle.dumps(Runs(eval, code)),
        "nested in a storage": pickle.dumps(Runs(torch.storage._load_from_bytes, inner)),
        "a zip of torch.save": torch_zip(inner),
        "a legacy tar": legacy_tar(inner),
        "yaml": f"!!python/object/apply:os.system ['{command}']\n".encode(),
    }


KINDS = list(payloads("x"))
PICKLES = ["os.system", "eval"]
IN_A_CHECKPOINT = ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST]
BESIDE = ["model.pt", ".metadata", "__0_0.distcp", "pytorch_model.bin", "random_states_0.pkl"]
IN_A_RUN = ["metrics.jsonl", "decisions.jsonl", "config.yaml", "summary.json", ".lock"]


@pytest.mark.parametrize("kind", PICKLES)
def test_the_payloads_run_where_they_are_unpickled(tmp_path, kind):
    """What follows would notice: the file is made by the reader that dptrain does not have."""
    pickle.loads(payloads(tmp_path / "marker")[kind])  # noqa: S301 -- this is the danger itself
    assert (tmp_path / "marker").exists()


def begin_run(run):
    """A run folder with one checkpoint and every file that stands beside it."""
    save(run / "checkpoints", 1)
    for name in ("metrics.jsonl", "decisions.jsonl"):
        with JsonlLog(run / name) as log:
            log.write({"kind": "train", "step": 1, "progress/samples": 8})
    write_config(run / "config.yaml", TrainConfig())
    (run / "summary.json").write_text("{}")
    (run / ".lock").touch()


def read_everything(run):
    """Read a run folder in every way that dptrain has; what is wrong in it may be reported in our own errors only."""
    with contextlib.suppress(DptrainError, ValueError, yaml.YAMLError):
        read_run(run)
    with contextlib.suppress(CheckpointError):
        newest = load_newest(run / "checkpoints")
        newest.tensors("model")
        newest.tensors("optimizer")
    for path in (run / "checkpoints").iterdir():
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path).tensors("model")
    for log in ("metrics.jsonl", "decisions.jsonl"):
        with contextlib.suppress(DptrainError):
            JsonlLog.resume(run / log, up_to=5).close()
    with contextlib.suppress(DptrainError):
        parse(["--run_dir", str(run), "--resume"])
    with contextlib.suppress(DptrainError):
        export([str(run), "--to", str(run / "weights")])
    save(run / "checkpoints", 9)


def plant(run, name, payload):
    """Put a payload in the place of a file, and give a checkpoint right sums with it where its manifest may list it."""
    if name in IN_A_RUN:
        (run / name).write_bytes(payload)
        return
    for step, verified in ((2, False), (3, True)):
        path = save(run / "checkpoints", step)
        (path / name).write_bytes(payload)
        if verified and name != MANIFEST:
            rewrite_manifest(
                path, **({name: module.sync_and_digest(path / name)} if PLAIN_NAME.fullmatch(name) else {})
            )


@pytest.mark.parametrize("kind", KINDS)
def test_g1_a_planted_pickle_runs_nothing_under_any_name(tmp_path, kind):
    """Under each file name of a checkpoint (right sums or not), beside them, and under each of a run folder."""
    marker = tmp_path / "marker"
    for number, name in enumerate(IN_A_CHECKPOINT + BESIDE + IN_A_RUN):
        run = tmp_path / f"run-{number}"
        begin_run(run)
        plant(run, name, payloads(marker)[kind])
        read_everything(run)
        assert not marker.exists(), f"{kind} under the name {name} was run"


# --- G3 ---


def to_symlink(path):
    (path / "model.safetensors").rename(path.parent / "elsewhere")
    (path / "model.safetensors").symlink_to(path.parent / "elsewhere")


def to_hard_link(path):
    os.link(path / "model.safetensors", path.parent / "elsewhere")


def to_pipe(path):
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")


def to_socket(path):
    (path / "state.json").unlink()
    before = Path.cwd()
    os.chdir(path)  # the path of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("state.json")
    finally:
        os.chdir(before)


def to_device(path):
    (path / "model.safetensors").unlink()
    os.mknod(path / "model.safetensors", stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero


def manifest_to_symlink(path):
    (path / MANIFEST).rename(path.parent / "elsewhere")
    (path / MANIFEST).symlink_to(path.parent / "elsewhere")


def folder_to_symlink(path):
    path.rename(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def twice(path):
    lines = (path / MANIFEST).read_text().splitlines(keepends=True)
    start = next(number for number, line in enumerate(lines) if "model.safetensors" in line)
    (path / MANIFEST).write_text("".join(lines[: start + 4] + lines[start:]))


def listed(name):
    return lambda path: rewrite_manifest(path, **{name: FileDigest(size_bytes=1, sha256="0" * 64)})


ATTACKS = {
    "a path upwards": (listed("../x"), "not a plain file name"),
    "an absolute path": (listed("/etc/passwd"), "not a plain file name"),
    "a path downwards": (listed("a/b"), "not a plain file name"),
    "a name with a line break": (listed("a\n"), "not a plain file name"),
    "the manifest itself": (listed(MANIFEST), "not a plain file name"),
    "a name twice": (twice, "not the JSON that dptrain writes"),
    "a link": (to_symlink, "model.safetensors is not a regular file"),
    "a hard link": (to_hard_link, "model.safetensors has 2 hard links"),
    "a pipe": (to_pipe, "model.safetensors is not a regular file"),
    "a socket": (to_socket, "state.json is not a regular file"),
    "a manifest that is a link": (manifest_to_symlink, "manifest.json is not a regular file"),
    "a folder that is a link": (folder_to_symlink, "Not a directory"),
    "a device": (to_device, "model.safetensors is not a regular file"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_g3_a_manifest_leads_nowhere_but_to_plain_files_beside_it(tmp_path, attack):
    """Refused with the reason, before anything is opened: a pipe would block, and a device may do something."""
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    plant, reason = ATTACKS[attack]
    try:
        plant(newest)
    except PermissionError:
        pytest.skip("only root can make a device")
    found = load_newest(tmp_path)
    assert found.step == 1
    assert reason in found.passed_over[0][1]


# --- G4 ---


def safetensors(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(shape, *offsets):
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


TWICE = b'{"w":%(w)s,"w":%(w)s}' % {b"w": json.dumps(entry([1], 0, 4)).encode()}
MANY = b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(400_000)) + b"}"
BOMBS = {
    "no header": b"",
    "no safetensors": b"\xff" * 64,
    "a header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + b"x" * 100,
    "a header of 200 MB": (200_000_000).to_bytes(8, "little") + bytes(200_000_000),
    "a header with 400,000 tensors": safetensors(MANY),
    "a header with 60,000 empty tensors": safetensors(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}
    ),
    "a header that is nested deeply": safetensors(b"[" * 100_000),
    "offsets that overlap": safetensors({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"),
    "offsets that leave a hole": safetensors({"a": entry([1], 4, 8)}, b"12345678"),
    "offsets beyond the end": safetensors({"a": entry([2], 0, 8)}, b"1234"),
    "2^60 numbers": safetensors({"a": entry([1 << 60], 0, 4)}, b"1234"),
    "2^80 numbers": safetensors({"a": entry([1 << 40, 1 << 40], 0, 0)}),
    "a tensor twice": safetensors(TWICE, b"1234"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_g4_a_safetensors_bomb_is_refused_within_bounds_of_memory(tmp_path, bomb):
    """With right sums it is still only a file: refused with our own error, in little more memory than it has bytes."""
    path = save(tmp_path)
    (path / "model.safetensors").write_bytes(BOMBS[bomb])
    rewrite_manifest(path)

    def body():
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not safetensors"):
            load_newest(tmp_path).tensors("model")
        grown_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
        return 0 if grown_bytes < len(BOMBS[bomb]) + (64 << 20) else 1

    assert forked(body) == 0


def test_g4_a_header_that_no_reader_would_take_is_not_written(tmp_path, monkeypatch):
    """The writer keeps the bound that the reader enforces, and an ordinary file is far from it."""
    monkeypatch.setattr("dptrain.checkpoint.manifest.MAX_HEADER_BYTES", 1000)
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"header of \d+ bytes"):
        save_checkpoint(tmp_path, step=2, tensors={"model": {f"w{i}": torch.ones(1) for i in range(50)}}, state={})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]


def test_g4_nothing_is_parsed_before_its_sum_was_verified(tmp_path, monkeypatch):
    """Of a file that its manifest does not vouch for, the parser sees no byte; the manifest's size has a bound."""

    def parser(*_):
        pytest.fail("an unverified file was parsed")

    path = save(tmp_path)
    opened = load_checkpoint(path)
    for name in ("model.safetensors", "state.json"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-1] + b"!")
        monkeypatch.setattr("dptrain.checkpoint.opened.load", parser)
        monkeypatch.setattr("dptrain.checkpoint.opened.decode_state", parser)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match="has changed since it was verified"):
            opened.tensors("model")
        (path / "model.safetensors").write_bytes(b"short")


# --- G6 ---


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_g6_files_are_private_under_any_umask(tmp_path, mask):
    """Neither a lax nor an absurd umask changes the modes: 0600 for files, 0700 for folders."""
    before = os.umask(mask)
    try:
        path = save(tmp_path / "made" / "checkpoints")
        with JsonlLog(path.parent / "metrics.jsonl") as log:
            log.write({"step": 1})
    finally:
        os.umask(before)
    files = [*path.iterdir(), path.parent / "metrics.jsonl"]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path, path.parent)} == {0o700}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_g6_a_folder_that_others_may_write_is_reported_once(tmp_path):
    """One warning when the run begins to use it, none for each save, and none where the folder is its owner's alone."""
    folder = tmp_path / "checkpoints"
    save(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AsyncWriter(folder).close()
    folder.chmod(0o777)
    with pytest.warns(RuntimeWarning) as caught:
        save_twice(folder)
    assert [str(warning.message).partition(" (")[0] for warning in caught] == [
        f"others can change what this run reads in {folder}"
    ]


def save_twice(folder):
    with AsyncWriter(folder) as writer:
        for step in (2, 3):
            writer.save(step=step, tensors={"model": {"w": torch.ones(1)}}, state={})
            writer.wait()
        assert writer.status().committed_step == 3
