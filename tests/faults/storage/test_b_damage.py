"""Section B, read: a damaged checkpoint is never loaded; the reader takes the one before, with the reason."""

from __future__ import annotations

import os
import random
import shutil

import pytest
import torch

from dptrain.checkpoint.manifest import MANIFEST, decode_manifest, encode_manifest
from dptrain.checkpoint.store import load_checkpoint, load_newest, save_checkpoint, set_aside
from dptrain.errors import CheckpointError
from tests.checkpoints import assert_holds, names, save

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST]


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
