"""Section B of the fault list as a whole run meets it: storage that fails, and what the replicas learn of that."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time

import pytest

from dptrain.checkpoint import async_writer as async_writer_module
from dptrain.checkpoint.store import load_newest
from dptrain.errors import AbortedError, CheckpointError
from dptrain.tracking.run_log import WritingLog
from dptrain.train import CheckpointConfig, Trainer
from dptrain.train import checkpoint_schedule as checkpoint_schedule_module
from tests.replicas import run_replicas
from tests.runs import Killed, attempt, kill, make_config, noisy, windows


def fail_to_save(rank, world_size, folder, failing):
    """Train, and let the saves with these numbers fail on the replica that saves."""
    save, calls, notes = async_writer_module.save_checkpoint, [], []

    def save_or_fail(*arguments, **options):
        calls.append(None)
        if len(calls) in failing:
            raise CheckpointError("the disk is full")
        return save(*arguments, **options)

    async_writer_module.save_checkpoint = save_or_fail
    note = WritingLog.note
    WritingLog.note = lambda log, text: notes.append(text) or note(log, text)
    try:
        attempt(folder)
    except (AbortedError, CheckpointError) as error:
        return type(error).__name__, str(error), notes
    finally:
        async_writer_module.save_checkpoint, WritingLog.note = save, note
    return "done", "", notes


def test_b12_a_save_that_fails_once_is_reported_and_the_run_goes_on(tmp_path):
    """Rank 0 fails to save once: reported in one note, the run ends well, and its last checkpoint is there."""
    (first, _, notes), (second, _, _) = run_replicas(fail_to_save, world_size=2, args=(tmp_path, {2}))
    assert (first, second) == ("done", "done")
    assert [note for note in notes if "disk" in note] == ["the disk is full; training goes on"]
    assert load_newest(tmp_path / "checkpoints").step == windows(tmp_path)[-1][0]


def test_b12_saves_that_go_on_failing_end_the_run_on_all_replicas(tmp_path):
    """After three in a row all replicas raise at the same step, none waits for another, the first one is there."""
    outcomes = run_replicas(fail_to_save, world_size=2, args=(tmp_path, set(range(2, 100))))
    assert [outcome[0] for outcome in outcomes] == ["CheckpointError", "CheckpointError"]
    assert outcomes[0][1] == outcomes[1][1]
    # The count is read a step late: a further save may have failed by then.
    count = re.match(r"(\d+) checkpoints in a row could not be written", outcomes[0][1])
    assert int(count[1]) in (3, 4)
    assert load_newest(tmp_path / "checkpoints") is not None


def test_a_run_whose_folder_is_moved_away_says_so_and_goes_on_from_it(tmp_path, monkeypatch):
    """It ends at the next look, and makes no new folder; put back, the old one is resumed to the end."""
    monkeypatch.setattr(checkpoint_schedule_module, "_LOOK_S", 0)
    folder, away = tmp_path / "run", tmp_path / "away"
    with pytest.raises(CheckpointError, match="put the folder back"):
        attempt(folder, kill_at=12, kill=lambda: folder.rename(away))
    assert not folder.exists()
    away.rename(folder)
    attempt(folder)
    assert [step for step, *_ in windows(folder)] == list(range(1, windows(folder)[-1][0] + 1))


def damage_all(folder):
    for path in (folder / "checkpoints").glob("step-*/model.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)


def test_b7_a_run_without_one_good_checkpoint_begins_anew_only_where_that_is_allowed(tmp_path):
    """All checkpoints damaged: refused with the way out; with it, the run begins again at its first step."""
    with pytest.raises(Killed):
        attempt(tmp_path, kill_at=12, kill=kill)
    damage_all(tmp_path)
    with pytest.raises(CheckpointError, match="--allow-fresh"):
        Trainer(make_config(tmp_path), task=noisy, resume=True)
    Trainer(make_config(tmp_path), task=noisy, resume=True, allow_fresh=True).run()
    steps = [step for step, *_ in windows(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert all(name.startswith(("step-", ".bad-")) for name in names)


def test_b7_a_run_that_has_ended_and_lost_its_checkpoints_does_not_begin_anew_over_its_log(tmp_path):
    """Refused with the way out, and the log stays; where it never ended, what is dropped of the log is said."""
    attempt(tmp_path)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"checkpoints are gone.*--allow-fresh"):
        Trainer(make_config(tmp_path), task=noisy, resume=True)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_rows_that_are_dropped_for_want_of_a_checkpoint_are_named(tmp_path, capsys):
    """Killed, and its checkpoints deleted: the run begins anew, and says up to which step its log is dropped."""
    with pytest.raises(Killed):
        attempt(tmp_path, kill_at=12, kill=kill)
    last = windows(tmp_path)[-1][0]
    shutil.rmtree(tmp_path / "checkpoints")
    attempt(tmp_path)
    assert f"the run begins anew, and the rows of its log up to step {last} are dropped" in capsys.readouterr().out
    assert [step for step, *_ in windows(tmp_path)] == list(range(1, windows(tmp_path)[-1][0] + 1))


def test_a17_the_end_of_a_run_is_saved_wherever_it_is(tmp_path):
    """The last step is on no interval, and no clock has come round: there is a checkpoint of it all the same."""
    config = make_config(tmp_path, max_samples=37, checkpoint=CheckpointConfig())
    attempt(tmp_path, config=config)
    saved = load_newest(tmp_path / "checkpoints")
    assert saved.state["progress"]["position"] == 37
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_h11_a_checkpoint_is_written_on_demand_and_the_run_goes_on(tmp_path, monkeypatch):
    """SIGUSR1: a checkpoint soon after, at no interval; the run ends as if nothing had been."""
    monkeypatch.setenv("TEST_MICRO_STEP_S", "0.01")
    found = []

    def ask_and_look():
        while not (tmp_path / "metrics.jsonl").exists() or len(windows_or_none(tmp_path)) < 3:
            time.sleep(0.005)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s and not list((tmp_path / "checkpoints").glob("step-*")):
            time.sleep(0.005)
        found.extend(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*"))

    thread = threading.Thread(target=ask_and_look)
    thread.start()
    attempt(tmp_path, config=make_config(tmp_path, checkpoint=CheckpointConfig()))
    thread.join()
    last = windows(tmp_path)[-1][0]
    assert found
    assert 3 <= found[0] < last


def windows_or_none(folder):
    try:
        return windows(folder)
    except (OSError, json.JSONDecodeError):
        return []
