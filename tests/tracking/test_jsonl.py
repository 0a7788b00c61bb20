"""The JSONL log: nothing written is lost or doubled, whatever interrupts it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.errors import DptrainError
from dptrain.tracking import jsonl
from dptrain.tracking.jsonl import JsonlLog, read_rows

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
rows = st.dictionaries(st.text(), values).map(lambda row: {**row, "step": 1})


def write(path, steps):
    with JsonlLog(path) as log:
        for step in steps:
            log.write({"kind": "train", "step": step, "train/loss": 1 / step, "reason": "φ × 2"})


@given(written=st.lists(rows, max_size=5))
def test_rows_survive_a_round_trip(tmp_path_factory, written):
    """What is written is what is read, values, types and order of fields alike."""
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    with JsonlLog(path) as log:
        for row in written:
            log.write(row)
    read = read_rows(path)
    assert read == written
    assert [list(row) for row in read] == [list(row) for row in written]


def test_values_that_are_not_finite_become_null(tmp_path):
    """The file is strict JSON even where the training is not finite."""
    path = tmp_path / "metrics.jsonl"
    with JsonlLog(path) as log:
        log.write({"step": 1, "a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.5})
    assert read_rows(path) == [{"step": 1, "a": None, "b": None, "c": None, "d": 0.5}]
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()


def test_a_lone_surrogate_is_written_as_its_escape(tmp_path):
    """A reason that quotes an undecodable file name neither stops the run nor spoils the file."""
    with JsonlLog(tmp_path / "d.jsonl") as log:
        log.write({"step": 1, "reason": "file \udc80"})
    (tmp_path / "d.jsonl").read_bytes().decode()
    assert read_rows(tmp_path / "d.jsonl") == [{"step": 1, "reason": "file \udc80"}]


def test_any_cut_leaves_a_prefix_of_the_rows(tmp_path):
    """Cut at any byte, the file reads as the rows before the cut, and a resumed log appends whole lines to them."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    write(whole, [1, 2, 3])
    everything, expected = whole.read_bytes(), read_rows(whole)
    lengths = set()
    for size in range(len(everything) + 1):
        cut.write_bytes(everything[:size])
        found = read_rows(cut)
        assert found == expected[: len(found)]
        lengths.add(len(found))
        with JsonlLog.resume(cut, up_to=3) as log:
            log.write({"step": 4})
        assert read_rows(cut) == [*found, {"step": 4}]
    assert lengths == {0, 1, 2, 3}


@pytest.mark.parametrize("torn", ["", '{"st', '{"step": 9}'])
def test_a_log_that_is_gone_on_with_begins_a_new_line(tmp_path, torn):
    """Behind a torn line, which goes, and behind a whole one that lacks its end alone, which stays."""
    path = tmp_path / "m.jsonl"
    write(path, [1, 2])
    with path.open("a") as file:
        file.write(torn)
    expected = read_rows(path)
    with JsonlLog(path, append=True) as log:
        log.write({"step": 10})
    assert read_rows(path) == [*expected, {"step": 10}]


@pytest.mark.parametrize("broken", [b"{nonsense", b"[1]", b'{"step": NaN}', b"\xff", b""])
def test_a_broken_line_in_the_middle_is_an_error(tmp_path, broken):
    """Damage that no kill can cause is reported with its line, never skipped."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with pytest.raises(DptrainError, match=r"line 2 of .*metrics\.jsonl"):
        read_rows(path)


@pytest.mark.parametrize("up_to", [0, 1, 3, 5, 9])
def test_resume_drops_what_lies_behind_the_checkpoint(tmp_path, up_to):
    """Rows behind the step that is resumed from go, the others stay byte for byte, and no temporary file is left."""
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4, 5])
    before = path.read_bytes().splitlines(keepends=True)
    JsonlLog.resume(path, up_to=up_to).close()
    assert path.read_bytes() == b"".join(before[:up_to])
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_killed_and_resumed_twice_equals_never_killed(tmp_path):
    """A run that lost steps after its checkpoint ends with the very same log."""
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    write(straight, range(1, 10))
    write(resumed, range(1, 5))
    for checkpoint, killed_at in ((3, 7), (5, 9)):
        with JsonlLog.resume(resumed, up_to=checkpoint) as log:
            for row in read_rows(straight)[checkpoint:killed_at]:
                log.write(row)
    assert resumed.read_bytes() == straight.read_bytes()


def test_resume_can_cut_by_another_key(tmp_path):
    """A log that is ordered by samples is cut by samples."""
    path = tmp_path / "log.jsonl"
    with JsonlLog(path, key="progress/samples") as log:
        for samples in (10, 20, 30):
            log.write({"progress/samples": samples})
    JsonlLog.resume(path, up_to=20, key="progress/samples").close()
    assert [row["progress/samples"] for row in read_rows(path)] == [10, 20]


def test_resume_of_a_missing_log_starts_one(tmp_path):
    """A run that was killed before its first row can be resumed."""
    with JsonlLog.resume(tmp_path / "m.jsonl", up_to=0) as log:
        log.write({"step": 1})
    assert read_rows(tmp_path / "m.jsonl") == [{"step": 1}]


def test_a_new_log_never_touches_an_old_one(tmp_path):
    """Opening a log where one exists is an error that names the way out."""
    write(tmp_path / "m.jsonl", [1])
    with pytest.raises(DptrainError, match="resume"):
        JsonlLog(tmp_path / "m.jsonl")
    assert len(read_rows(tmp_path / "m.jsonl")) == 1


def test_a_row_is_readable_before_the_log_is_closed(tmp_path):
    """A kill right after `write` costs nothing."""
    log = JsonlLog(tmp_path / "m.jsonl")
    log.write({"step": 1})
    assert read_rows(tmp_path / "m.jsonl") == [{"step": 1}]
    log.close()
    log.close()


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_files_are_the_owners_alone(tmp_path, mask):
    """New, resumed and rewritten logs have mode 0600 under any umask, even where the old one was open."""
    path = tmp_path / "m.jsonl"
    previous = os.umask(mask)
    try:
        write(path, [1])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        JsonlLog.resume(path, up_to=1).close()
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_full_disk_loses_and_doubles_no_row(tmp_path):
    """Rows that the disk refused go out, whole and in order, once there is room again."""
    program = """
import resource, sys
from dptrain.tracking.jsonl import JsonlLog
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
log, refused = JsonlLog(sys.argv[1]), 0
resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
for step in range(1, 11):
    if step == 8:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        log.write({"step": step})
    except OSError:
        refused += 1
log.close()
print(refused)
"""
    path = tmp_path / "m.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True, timeout=240
    )
    assert int(done.stdout) > 0
    assert [row["step"] for row in read_rows(path)] == list(range(1, 11))


def test_the_file_is_json_for_other_readers(tmp_path):
    """Any JSON reader takes it line by line."""
    write(tmp_path / "m.jsonl", [1, 2])
    lines = Path(tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 16])
def test_lines_from_the_end_are_the_lines(tmp_path, monkeypatch, block):
    """Whatever the size of a block, and with or without a line break at the end."""
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", block)
    path = tmp_path / "log"
    for text in (b"", b"\n", b"a", b"a\n", b"a\nbb\n\nccc", b"\n\na\n"):
        path.write_bytes(text)
        found = list(jsonl._lines_from_end(path))[::-1]
        assert b"".join(line for _, line in found) == text
        assert all(text[start:].startswith(line) for start, line in found)
        assert [line for _, line in found] == text.splitlines(keepends=True)


@pytest.mark.parametrize(
    "broken", [b"{nonsense", b"[1]", b'{"step": NaN}', b"\xff\x00", b'{"other": 1}', b'{"step": "1"}']
)
def test_a_log_with_a_garbled_line_is_gone_on_with(tmp_path, broken):
    """A loss of power may leave one: it is dropped and named once, and the rows around it stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + broken + b'\n{"step": 3}\n')
    with JsonlLog.resume(path, up_to=3) as log:
        assert log.damage == "line 2 is no row"
        assert list(log.steps) == [1, 3]
    assert read_rows(path) == [{"step": 1}, {"step": 3}]


def test_rows_that_stand_twice_stand_once_in_a_log_that_is_gone_on_with(tmp_path):
    """Told with their number."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 1}\n{"step": 2}\n{"step": 9}\n')
    with JsonlLog.resume(path, up_to=3) as log:
        assert log.damage == "2 rows stand twice"
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_a_sound_log_has_no_damage(tmp_path):
    """Nothing is said of it, nor of a line that a kill has torn."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    with JsonlLog.resume(path, up_to=3) as log:
        assert log.damage == ""
