"""Invariants 4, 5, 6, 14 and 15 of section "Invariants": storage, whatever the order of saves, deaths and damage."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dptrain.checkpoint import opened as opened_folders
from dptrain.checkpoint import store as module
from dptrain.checkpoint.manifest import MANIFEST, PLAIN_NAME, FileDigest, decode_manifest, encode_manifest
from dptrain.checkpoint.store import load_checkpoint, load_newest, save_checkpoint
from dptrain.errors import CheckpointError
from dptrain.tracking.jsonl import JsonlLog, read_rows

EXAMPLES = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Killed(BaseException):
    """Stands for the end of the process."""


class Disk:
    """Every change that a save makes to the disk, with a point at which the process dies or the disk is full.

    After a death nothing is changed any more, whatever the code between would still do: so it is with a real one, which
    tests/faults/storage/test_b_storage.py uses (B1, B15); this one does hundreds per second.
    """

    CHANGES = (
        *((module, "save_file"), (Path, "write_bytes"), (shutil, "rmtree")),
        *((os, call) for call in ("mkdir", "fsync", "rename", "unlink", "rmdir")),
    )

    def __init__(self, *, dies_at=None, full_at=None):
        self._dies_at, self._full_at = dies_at, full_at
        self.num_changes = 0

    @contextlib.contextmanager
    def in_place(self):
        """Stand between the code and the disk."""
        with pytest.MonkeyPatch.context() as patch:
            for owner, call in self.CHANGES:
                patch.setattr(owner, call, self._through(getattr(owner, call), name=call))
            yield self

    def _through(self, real, *, name):
        def change(*arguments, **options):
            here, self.num_changes = self.num_changes, self.num_changes + 1
            if self._dies_at is not None and here >= self._dies_at:
                if here == self._dies_at:
                    self._half(name, arguments)
                raise Killed
            if self._full_at is not None and here >= self._full_at and name in {"save_file", "write_bytes", "mkdir"}:
                self._half(name, arguments)
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*arguments, **options)

        return change

    def _half(self, name, arguments):
        """A file that was being written is there in part."""
        if name in {"save_file", "write_bytes"}:
            with Path(arguments[0] if name == "write_bytes" else arguments[1]).open("wb") as file:
                file.write(b"half")


def toy_step(state, *, position):
    """One optimizer step of a toy: what it does depends on the state and on the position alone."""
    noise = torch.randn(6, generator=torch.Generator().manual_seed(position))
    moment = 0.9 * state["moment"] + noise
    return {"w": state["w"] - 0.1 * moment, "moment": moment}


def toy_run(num_steps):
    """The state after `num_steps` steps that nothing interrupted."""
    state = {"w": torch.zeros(6), "moment": torch.zeros(6)}
    yield state
    for position in range(num_steps):
        state = toy_step(state, position=position)
        yield state


UNINTERRUPTED = list(toy_run(400))
BIASES = (float("inf"), -0.0, 0.1)


def save_toy(folder, step, state, *, keep=2):
    tensors = {"model": {"w": state["w"]}, "optimizer": {"moment": state["moment"]}}
    return save_checkpoint(folder, step=step, tensors=tensors, state={"cursor": step, "biases": BIASES}, keep=keep)


def load_toy(found):
    assert found.state == {"cursor": found.step, "biases": BIASES}
    return {"w": found.tensors("model")["w"], "moment": found.tensors("optimizer")["moment"]}


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def damage(path, *, name, place, how):
    """Spoil one file of a checkpoint and return what puts it right again."""
    file = path / name
    original = file.read_bytes()
    spot = place % len(original)
    spoilt = {
        "flip": original[:spot] + bytes([original[spot] ^ 1 + place % 255]) + original[spot + 1 :],
        "cut": original[:spot],
        "insert": original[:spot] + b" " + original[spot:],
        "remove": None,
    }[how]
    file.unlink()
    if spoilt is not None:
        file.write_bytes(spoilt)
    return lambda: file.write_bytes(original)


NAMES = ["model.safetensors", "optimizer.safetensors", "state.json", MANIFEST]
DAMAGE = st.fixed_dictionaries(
    {
        "name": st.sampled_from(NAMES),
        "place": st.integers(0, 10_000),
        "how": st.sampled_from(["flip", "cut", "insert", "remove"]),
    }
)
POINTS = st.integers(0, 30)  # a save makes some 15 to 30 changes; later points are saves that come through


class Run(RuleBasedStateMachine):
    """A toy training run with one folder of checkpoints, and what may happen to both."""

    KEEP = 2

    @initialize()
    def begin(self):
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "checkpoints"
        self.state, self.step = UNINTERRUPTED[0], 0
        self.good = {}  # step → files, of every checkpoint that was acknowledged and not spoilt since
        self.acknowledged = 0

    def teardown(self):
        if hasattr(self, "place"):
            self.place.cleanup()

    @rule(num_steps=st.integers(1, 5))
    def train(self, num_steps):
        for _ in range(num_steps):
            self.state = toy_step(self.state, position=self.step)
            self.step += 1

    @rule(num_steps=st.integers(0, 3))
    def train_and_save(self, num_steps):
        self.train(num_steps)
        self.acknowledge(save_toy(self.folder, self.step, self.state, keep=self.KEEP))
        assert not [path for path in self.folder.iterdir() if path.name.startswith(".tmp")]

    @rule(point=POINTS)
    def crash(self, point):
        """Die in a save, and go on from what is there."""
        with Disk(dies_at=point).in_place():
            try:
                self.acknowledge(save_toy(self.folder, self.step, self.state, keep=self.KEEP))
            except Killed:
                # A new process knows nothing of what the old one had verified.
                opened_folders.verdicts.clear()
        self.load()

    @rule(point=POINTS)
    def fill_disk(self, point):
        """The disk is full from some change on: the save fails with its sentence, and training goes on."""
        with Disk(full_at=point).in_place():
            try:
                self.acknowledge(save_toy(self.folder, self.step, self.state, keep=self.KEEP))
            except CheckpointError as error:
                assert "could not be written: [Errno 28]" in str(error)  # noqa: PT017 -- it may also come through
                self.note_retired()

    @precondition(lambda self: self.good)
    @rule(spoil=DAMAGE)
    def corrupt_newest(self, spoil):
        damage(self.folder / f"step-{max(self.good):012d}", **spoil)
        del self.good[max(self.good)]

    @rule()
    def load(self):
        """Resume: the state is the uninterrupted run's at that step, and saving it again gives the same bytes."""
        try:
            found = load_newest(self.folder)
        except CheckpointError:
            assert not self.good
            shutil.rmtree(self.folder)  # as a user would who starts afresh
            found = None
        if found is None:
            assert not self.good
            self.state, self.step = UNINTERRUPTED[0], 0
            return
        assert found.step >= max(self.good, default=0), "an acknowledged checkpoint was lost"
        self.state, self.step = load_toy(found), found.step
        again = save_toy(Path(self.place.name) / "again", self.step, self.state)
        assert contents(again) == contents(found.path)
        shutil.rmtree(again.parent)
        self.good[found.step] = contents(found.path)
        self.note_retired()

    def acknowledge(self, path):
        self.good[self.step] = contents(path)
        self.note_retired()

    def note_retired(self):
        """A save retires old ones before and after its own commit, so also one that failed or died may have."""
        to_keep = sorted(step for step in self.good if step <= self.step)[-self.KEEP :]
        for step in sorted(self.good):
            if not (self.folder / f"step-{step:012d}").exists():
                assert step not in to_keep, "retention counts intact checkpoints alone"
                assert step <= self.step, "retention removes nothing ahead"
                del self.good[step]

    @invariant()
    def the_run_is_the_uninterrupted_one(self):
        if hasattr(self, "state"):
            expected = UNINTERRUPTED[self.step]
            assert all(self.state[key].equal(expected[key]) for key in expected)

    @invariant()
    def what_was_good_stays_as_it_was(self):
        for step, files in getattr(self, "good", {}).items():
            path = self.folder / f"step-{step:012d}"
            if path.exists():
                assert contents(path) == files
        if getattr(self, "good", None):
            assert (self.folder / f"step-{max(self.good):012d}").exists()


class TestRun(Run.TestCase):
    """Invariant 4: resuming changes nothing, whatever happened before."""

    settings = settings(max_examples=300, stateful_step_count=12)


@pytest.fixture(scope="module")
def four():
    """A folder with checkpoints of steps 1 to 4."""
    with tempfile.TemporaryDirectory() as folder:
        for step in range(1, 5):
            save_toy(Path(folder), step, UNINTERRUPTED[step], keep=4)
        yield Path(folder)


@EXAMPLES
@given(spoilt=st.dictionaries(st.integers(1, 4), DAMAGE))
def test_invariant_5_the_newest_verified_wins(four, spoilt):
    """For any subset of damaged checkpoints the greatest intact step is returned; where none is intact, an error."""
    restore = [damage(four / f"step-{step:012d}", **how) for step, how in spoilt.items()]
    try:
        intact = {1, 2, 3, 4} - spoilt.keys()
        if intact:
            found = load_newest(four)
            assert found.step == max(intact)
            assert [path.name for path, _ in found.passed_over] == [
                f"step-{step:012d}" for step in range(4, found.step, -1)
            ]
            assert load_toy(found)["w"].equal(UNINTERRUPTED[found.step]["w"])
        else:
            with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be trusted"):
                load_newest(four)
    finally:
        for undo in restore:
            undo()


@EXAMPLES
@given(
    saves=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.none() | POINTS), min_size=1, max_size=6),
)
def test_invariant_6_retention_keeps_one_and_bounds_the_disk(saves):
    """After any saves and deaths the newest acknowledged step, or a later one, is intact; disk ≤ (keep + 1) × size."""
    with tempfile.TemporaryDirectory() as place:
        folder, step, acknowledged, largest_keep = Path(place), 0, None, 0
        for ahead, keep, point in saves:
            step += ahead
            largest_keep = max(largest_keep, keep)
            with Disk(dies_at=point).in_place(), contextlib.suppress(Killed):
                save_toy(folder, step, UNINTERRUPTED[step], keep=keep)
                acknowledged = step
            if acknowledged is not None:
                assert load_newest(folder).step >= acknowledged
            assert len(list(folder.iterdir())) <= largest_keep + 1
            if acknowledged == step:
                assert len(list(folder.iterdir())) <= keep
                largest_keep = keep


def test_invariant_6_a_save_needs_room_for_one_more_than_it_keeps(tmp_path):
    """Also where the save before died before it could prune: what is too many goes before the new one is written."""
    save_toy(tmp_path, 1, UNINTERRUPTED[1], keep=1)
    save_toy(tmp_path, 2, UNINTERRUPTED[2], keep=2)
    present = []
    with pytest.MonkeyPatch.context() as patch:
        real = module.save_file
        patch.setattr(module, "save_file", lambda *a: (present.append(sorted(os.listdir(tmp_path))[1:]), real(*a)))  # noqa: PTH208 -- names alone
        save_toy(tmp_path, 3, UNINTERRUPTED[3], keep=1)
    assert present == [["step-000000000002"]] * 2


@pytest.fixture(scope="module")
def one():
    """A checkpoint that the examples damage and put right again."""
    with tempfile.TemporaryDirectory() as folder:
        yield save_toy(Path(folder), 7, UNINTERRUPTED[7])


@EXAMPLES
@given(spoil=DAMAGE, more=st.lists(DAMAGE, max_size=3))
def test_invariant_14_any_mutation_of_any_file_is_detected(one, spoil, more):
    """Bytes changed, cut off or put in, files removed, in the manifest too: refused, with our own error."""
    restore = [(one / name, (one / name).read_bytes()) for name in NAMES]
    try:
        damage(one, **spoil)
        for further in more:
            if (one / further["name"]).exists() and (one / further["name"]).stat().st_size:
                damage(one, **further)
        before = {path.name: content for path, content in restore}
        if contents(one) != before:  # two changes may cancel one another
            with pytest.raises(CheckpointError):
                load_checkpoint(one)
    finally:
        for path, content in restore:
            path.write_bytes(content)
    assert load_checkpoint(one).step == 7


@EXAMPLES
@given(
    name=st.text() | st.from_regex(PLAIN_NAME, fullmatch=True).map(lambda name: f"a/{name}") | st.sampled_from(NAMES)
)
def test_invariant_14_a_path_that_is_no_plain_basename_is_refused(name):
    """Whatever a manifest with a right sum lists: a plain file name comes back, any other is an error."""
    digests = {name: FileDigest(size_bytes=1, sha256="0" * 64)}
    plain = name == Path(name).name and name.isascii() and name[:1].isalnum() and name != MANIFEST
    content = encode_manifest(step=1, written_by="1", digests=digests)
    if plain and PLAIN_NAME.fullmatch(name):
        assert decode_manifest(content) == (1, digests)
        return
    with pytest.raises(CheckpointError, match="not a plain file name"):
        decode_manifest(content)


VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
ROWS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), max_size=5)


@EXAMPLES
@given(rows=ROWS, cut=st.integers(0, 10_000), more=ROWS)
def test_invariant_15_any_prefix_of_a_log_reads_as_a_prefix_of_its_rows(tmp_path_factory, rows, cut, more):
    """Cut at any byte it reads as the rows before, and a resumed run writes behind them, on a line of their own."""
    path = tmp_path_factory.mktemp("log", numbered=True) / "log.jsonl"
    rows = [{**row, "step": number} for number, row in enumerate(rows)]
    with JsonlLog(path) as log:
        for row in rows:
            log.write(row)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % (len(whole) + 1)])
    found = read_rows(path)
    assert found == rows[: len(found)]
    with JsonlLog(path, append=True) as log:
        for row in more:
            log.write({**row, "step": 99})
    assert read_rows(path) == [*found, *({**row, "step": 99} for row in more)]


@pytest.fixture(autouse=True)
def quiet():
    """What cannot be removed while the process dies is of no interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def test_the_disk_of_these_tests_has_the_points_they_name(tmp_path):
    """The proofs above have teeth: a save makes more changes than one, dies at each, and then leaves what it had."""
    with Disk().in_place() as disk:
        save_toy(tmp_path, 1, UNINTERRUPTED[1])
    assert 10 < disk.num_changes < 30
    for point in itertools.takewhile(lambda point: point < disk.num_changes, itertools.count()):
        with Disk(dies_at=point).in_place(), pytest.raises(Killed):
            save_toy(tmp_path / str(point), 1, UNINTERRUPTED[1])
