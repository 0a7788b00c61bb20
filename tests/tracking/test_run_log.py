"""The log of rank 0: where a file does not take what it is told, training goes on and the summary counts it."""

from __future__ import annotations

import errno
import json
from contextlib import closing
from dataclasses import replace

import pytest
from filelock import FileLock

from dptrain.config.filled_in import filled_in
from dptrain.errors import ConfigError
from dptrain.tasks import Suggestion
from dptrain.tracking import run_log
from dptrain.tracking.export import heartbeat
from dptrain.tracking.jsonl import JsonlLog, read_rows
from dptrain.tracking.run_facts import RunFacts
from dptrain.tracking.run_folder import RunFolder
from dptrain.tracking.run_log import WritingLog, _gaps
from dptrain.train import LogConfig, TrainConfig

SUGGESTION = Suggestion(
    learning_rate=0.01, global_batch_size=16, micro_batch_size=4, max_samples=10_000, eval_every_samples=1_000
)
CONFIG = filled_in(TrainConfig(log=LogConfig(tracker="none", print_every_steps=1000)), SUGGESTION, world_size=1)

FACTS = RunFacts(
    task="t",
    num_parameters=3,
    num_trained_parameters=3,
    gradient_bytes=4 * 3,
    num_samples=8,
    num_held_out=2,
    world_size=1,
    device="cpu",
    device_name=None,
    torch_version="2.9",
)


@pytest.fixture
def said(capsys):
    """Return what was printed, by line."""

    def lines():
        return capsys.readouterr().out.splitlines()

    return lines


@pytest.fixture
def disk(monkeypatch):
    """Let every write to a log fail while `disk["full"]`."""
    state = {"full": False}
    write = run_log.JsonlLog._flush

    def flush(log):
        if state["full"] and log._pending:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(log)

    monkeypatch.setattr(JsonlLog, "_flush", flush)
    return state


def open_log(path, *, config=CONFIG, resume=False):
    return WritingLog(RunFolder(path, resume=resume), config=config, up_to_step=0, facts=FACTS)


def row(step):
    return {"kind": "train", "step": step, "progress/samples": 16 * step}


def test_rows_and_summary_are_written(tmp_path):
    """What was logged is in the files, and the folder is free again."""
    log = open_log(tmp_path)
    log.train(row(1))
    log.evaluation({**row(1), "kind": "eval"})
    log.decision({"step": 1, "batch/before": 16, "batch/after": 32, "reason": "\x1b"})
    log.finish({"steps": 1, "task": "ä\x9b"})
    log.close()
    log.close()
    assert [found["kind"] for found in read_rows(tmp_path / "metrics.jsonl")] == ["train", "eval"]
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 1, "task": "ä\x9b", "log_failures": 0}
    assert (tmp_path / "summary.json").read_bytes().isascii()
    with FileLock(tmp_path / ".lock").acquire(timeout=0):
        pass


def test_the_heartbeat_is_due_between_rows_that_are_logged(tmp_path, monkeypatch):
    """With rows that are a thousand steps apart, a run that trains rewrites the file all the same."""
    monkeypatch.setattr(heartbeat, "_EVERY_S", 1e9)
    changes = {"every_steps": 1000, "print_every_steps": 1000}
    with closing(open_log(tmp_path / "run", config=replace(CONFIG, log=replace(CONFIG.log, **changes)))) as log:
        assert log.takes(1)
        log.train(row(1))
        assert not log.takes(2)
        log._exports._exports[0]._next_s = 0.0
        assert log.takes(3)
        log.train(row(3))
        assert json.loads((tmp_path / "run" / "heartbeat.json").read_text())["step"] == 3
        assert not (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_full_disk_delays_rows_and_is_reported_once(tmp_path, said, disk):
    """No row is lost, none is written twice, and training hears of nothing."""
    log = open_log(tmp_path)
    log.train(row(1))
    disk["full"] = True
    for step in (2, 3, 4):
        log.train(row(step))
    log.decision({"step": 4, "batch/before": 16, "batch/after": 32, "reason": "r"})
    disk["full"] = False
    log.train(row(5))
    log.finish({"steps": 5})
    log.close()
    assert [found["step"] for found in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [found["step"] for found in read_rows(tmp_path / "decisions.jsonl")] == [4]
    assert json.loads((tmp_path / "summary.json").read_text())["log_failures"] == 4
    (note,) = [line for line in said() if "cannot write" in line]
    assert "metrics.jsonl: No space left on device; training continues" in note


def test_rows_that_never_found_room_are_said_to_be_lost(tmp_path, said, disk):
    """The end of a run on a full disk is the end of a run."""
    log = open_log(tmp_path)
    disk["full"] = True
    log.train(row(1))
    log.close()
    assert [line for line in said() if "the last rows of" in line and "are lost: No space left" in line]


def test_a_folder_that_takes_no_settings_is_refused(tmp_path, monkeypatch):
    """A disk that is full from the start is a sentence, and the folder is free again."""

    def write_config(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_log, "write_config", write_config)
    with pytest.raises(ConfigError, match=r"cannot write to run folder .*: No space left on device"):
        open_log(tmp_path)
    with FileLock(tmp_path / ".lock").acquire(timeout=0):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "decisions.jsonl"])
def test_a_log_that_cannot_be_opened_is_refused_on_resume(tmp_path, name):
    """Something else in the place of a log, or one that is not ours, is a sentence with its path and no traceback."""
    open_log(tmp_path / "run").close()
    (tmp_path / "run" / name).unlink()
    (tmp_path / "run" / name).mkdir()
    with pytest.raises(ConfigError, match=rf"cannot write to run folder .*{name}: Is a directory"):
        WritingLog(RunFolder(tmp_path / "run", resume=True), config=CONFIG, up_to_step=3, facts=FACTS)


def test_settings_with_a_secret_are_not_written(tmp_path):
    """A caller from Python is asked for the same care as on the command line."""
    with pytest.raises(ConfigError, match=r"task_options.password looks like a secret"):
        open_log(tmp_path, config=replace(CONFIG, task_options={"password": "hunter2"}))
    assert not any("hunter2" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("steps", "every_steps", "up_to", "gaps"),
    [
        (range(1, 11), 1, 10, ""),
        (range(5, 101, 5), 5, 103, ""),
        ([*range(1, 6), *range(9, 11)], 1, 10, "6–8"),
        (range(1, 6), 1, 10, "6–10"),
        ([], 1, 10, "1–10"),
        ([2, 4, 6], 1, 6, ""),
        ([10, 20, 30, 31, 32, 33, 34], 1, 34, ""),
        ([1, 3, 4, 8], 1, 8, "2, 5–7"),
        ([], 50, 40, ""),
        ([1, 2, 6, 7, 11, 12, 16], 1, 16, "3–5, 8–10, 13–15"),  # as many rows lost each time
    ],
)
def test_steps_without_a_row_are_named(steps, every_steps, up_to, gaps):
    """Up to the checkpoint, and not those that another `log.every_steps` of an earlier attempt left out."""
    assert _gaps(list(steps), every_steps=every_steps, up_to=up_to) == gaps
