"""The loop of a sweep on runs that only pretend: what each exit code leads to, and how many run at a time."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dptrain.errors import ConfigError
from dptrain.sweep import SweepSpec
from dptrain.sweep import loop as sweep_loop
from dptrain.sweep.child_runs import Site
from dptrain.sweep.folder import SweepFolder
from dptrain.sweep.loop import SignalHandler, SweepLoop

EVERY = 10


class View:
    """Takes note of what it is told."""

    def __init__(self):
        self.ends = []

    def update(self, standing):
        self.standing = standing

    def ended(self, run, _standing):
        self.ends.append(run.name)


class Play:
    """Stands in for `dptrain train`: every start of a run plays the next act of its part."""

    def __init__(self, parts):
        self.parts = {name: list(acts) for name, acts in parts.items()}
        self.started, self.at_work, self.most_at_work = [], 0, 0

    def __call__(self, arguments, *, log, **_):
        options = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments[1:])
        name = options["run_dir"].rpartition("/")[2]
        self.started.append((name, "resume" in options))
        acts = self.parts.get(name, [])
        return Actor(self, options, act=acts.pop(0) if acts else 0, log=log)


class Actor:
    """One start: an exit code, or "long" for a run that has to be stopped."""

    def __init__(self, play, options, *, act, log):
        self.play, self.act, self.log = play, act, log
        self.is_asked_to_stop, self.looks, self.has_ended = False, 0, False
        play.at_work += 1
        play.most_at_work = max(play.most_at_work, play.at_work)
        self.write(options)

    def write(self, options):
        folder = Path(options["run_dir"])
        folder.mkdir(exist_ok=True)
        rate, batch = float(options["optimizer.learning_rate"]), int(options["global_batch_size"])
        fall = 0.1 / (1 + abs(rate / 0.1 - 1)) / (1 + batch / 8)
        num = {0: 60, "long": 100}.get(self.act, 2)
        rows = [
            {"kind": "eval", "step": at, "progress/samples": EVERY * at, "eval/loss": 0.5 ** (fall * at)}
            for at in range(1, num + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if self.act == 0:
            (folder / "summary.json").write_text("{}")

    @property
    def code(self):
        self.looks += 1
        if self.looks < 3 or (self.act == "long" and not self.is_asked_to_stop):
            return None
        if not self.has_ended:
            self.has_ended, self.play.at_work = True, self.play.at_work - 1
        return 75 if self.act == "long" else self.act

    def stop(self):
        self.is_asked_to_stop = self.is_asked_to_stop or not self.has_ended

    def kill(self):
        self.act = -signal.SIGKILL

    def last_line(self):
        return "dptrain train: the batch is not reachable"


@pytest.fixture
def played(tmp_path, monkeypatch):
    def play(parts=None, *, num_parallel=1, rates=(0.05, 0.1, 0.2), batches=(8,), targets=(0.5,)):
        acting = Play(parts or {})
        monkeypatch.setattr(sweep_loop, "RunProcess", acting)
        spec = SweepSpec(
            batch_sizes=list(batches),
            targets=list(targets),
            seeds=[0],
            learning_rates=list(rates),
            base_batch_size=8,
            base_learning_rate=0.1,
            base_samples=10_000,
            exponent=0.5,
        )
        site = Site(num_parallel=num_parallel, num_replicas=1, gpus=[], num_threads=1)
        folder = SweepFolder(tmp_path / f"sweep-{len(list(tmp_path.iterdir()))}")
        loop = SweepLoop(spec, folder=folder, site=site, max_skipped_steps=10)
        view = View()
        try:
            return acting, view, loop.run(view)
        finally:
            folder.close()

    return play


NAMES = [f"batch-8-lr-{rate}-seed-0" for rate in ("0.05", "0.1", "0.2")]


def test_every_run_is_started_once(played):
    """And the batch has its choice."""
    acting, view, ending = played()
    assert acting.started == [(name, False) for name in NAMES]
    assert view.ends == NAMES
    assert ending.searches[0].choices[0].grid_point == 1
    assert (dict(ending.failures), ending.was_stopped) == ({}, False)


def test_targets_crossed_before_the_first_evaluation_stop_the_sweep(played):
    """At the first run that shows it, with the setting to change; no further run is started."""
    with pytest.raises(ConfigError, match=r"reached target 0.99 at its first evaluation.*--log.eval-every-samples"):
        played(targets=(0.99, 0.5))
    assert sweep_loop.RunProcess.started == [(NAMES[0], False)]


@pytest.mark.parametrize("num_parallel", [1, 2, 5])
def test_as_many_run_at_a_time_as_there_is_room_for(played, num_parallel):
    """No more, and no fewer while there are some to run."""
    acting, _, _ = played(num_parallel=num_parallel, batches=(8, 16))
    assert acting.most_at_work == num_parallel
    assert len(acting.started) == 6


def test_a_run_that_needs_no_more_is_stopped(played):
    """It would go on for ever, and all its targets are reached."""
    acting, _, ending = played({NAMES[0]: ["long"]})
    assert ending.searches[0].choices
    assert len(acting.started) == 3


@pytest.mark.parametrize("code", [-signal.SIGKILL, 75])
def test_a_run_that_somebody_ended_goes_on(played, code):
    """From where it was, as often as that leads anywhere."""
    acting, _, ending = played({NAMES[1]: [code, code]})
    assert acting.started.count((NAMES[1], True)) == 2
    assert ending.searches[0].choices
    acting, _, ending = played({NAMES[1]: [code] * 10})
    assert 3 < len(acting.started) < 10
    assert list(ending.failures.values()) == [code]


def test_a_run_that_failed_is_reported_and_the_others_go_on(played):
    """It is not started again: `dptrain train` has tried what can be tried."""
    acting, _, ending = played({NAMES[0]: [74, 74]})
    assert len(acting.started) == 3
    assert {run.name: code for run, code in ending.failures.items()} == {NAMES[0]: 74}
    assert [run.name for run in ending.searches[0].unsettled] == [NAMES[0]]


def test_a_run_that_diverged_is_done(played):
    """By its exit code also where its log does not show it."""
    _, _, ending = played({NAMES[2]: [65]})
    assert not ending.failures
    assert ending.searches[0].choices[0].grid_point == 1


def test_wrong_settings_end_the_sweep(played):
    """With the sentence of the run, as all others would say the same."""
    with pytest.raises(ConfigError, match=r"^the batch is not reachable \(run batch-8-lr-0.05-seed-0\)$"):
        played({NAMES[0]: [2]})


def test_a_second_signal_soon_after_the_first_is_the_same_request(monkeypatch):
    """A terminal's Ctrl-C comes more than once; seconds later it is meant."""
    now = [100.0]
    monkeypatch.setattr(sweep_loop.time, "monotonic", lambda: now[0])
    with SignalHandler() as stop:
        for at, expected in ((100.0, (True, False)), (101.0, (True, False)), (103.0, (True, True))):
            now[0] = at
            os.kill(os.getpid(), signal.SIGINT)
            assert (stop.asked, stop.insisted) == expected
