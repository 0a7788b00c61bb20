"""The tracker is a second copy: whatever wandb or the network does, training starts, goes on and ends in time."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from typing import ClassVar

import pytest

from dptrain.errors import ConfigError
from dptrain.tracking import tracker
from dptrain.tracking.tracker import BackgroundTracker, SeveralTrackers, start_tracker

CANARY = "canary0123456789canary0123456789canary01"


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch, tmp_path):
    for name in [*os.environ]:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


@pytest.fixture
def silent_listener():
    """A server that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


class Sink:
    """Keeps what it is told; misbehaves where it is told to."""

    def __init__(self, *, fail=(), hang=()):
        self.calls, self.fail, self.hang = [], fail, hang
        self.let_go = threading.Event()

    def _do(self, name, *values):
        self.calls.append((name, *values))
        if name in self.fail:
            raise OSError(f"{name} failed\nwith details")
        if name in self.hang:
            self.let_go.wait(30)

    def start(self, *, notify):
        notify("hello")
        self._do("start")

    def log(self, values):
        self._do("log", values)

    def finish(self, summary):
        self._do("finish", summary)

    def release(self):
        self._do("release")

    def abandon(self):
        self._do("abandon")
        self.let_go.set()


def run_tracked(sink, **limits):
    said = []
    begun = time.monotonic()
    tracked = BackgroundTracker(sink, warn=said.append, **limits)
    for step in (1, 2):
        tracked.log({"kind": "train", "step": step, "train/loss": 0.5, "noise_scale/upper": None}, step=step)
    tracked.finish({"steps": 2})
    tracked.finish({"steps": 2})
    return said, time.monotonic() - begun


def start(tmp_path, *, choice, said=None):
    return start_tracker(
        choice=choice,
        project="p",
        run_name="n",
        run_dir=tmp_path,
        config={},
        warn=(said if said is not None else []).append,
    )


def test_rows_arrive_in_order_and_once():
    """The sink sees each row without its nulls, then the summary, and is released last; twice finished is once."""
    sink = Sink()
    said, _ = run_tracked(sink)
    row = {"train/loss": 0.5}
    assert sink.calls == [
        ("start",),
        ("log", {"progress/step": 1, **row}),
        ("log", {"progress/step": 2, **row}),
        ("finish", {"steps": 2}),
        ("release",),
    ]
    assert said == ["hello"]


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_an_exception_is_one_warning(method):
    """Whichever method raises, nothing reaches the caller but one line, and the sink is still released."""
    sink = Sink(fail={method})
    said, _ = run_tracked(sink)
    assert said == ["hello", f"wandb is switched off, training goes on: OSError: {method} failed"]
    assert sink.calls[-1] == ("release",)


def test_an_exception_in_release_is_nobodys_business():
    """Closing down is quiet."""
    assert run_tracked(Sink(fail={"release"}))[0] == ["hello"]


@pytest.mark.parametrize("method", ["start", "log", "finish", "release"])
def test_a_hanging_sink_costs_no_more_than_the_limits(method):
    """Whichever method never returns, the run waits its limits, says so once for each, and leaves the sink behind."""
    sink = Sink(hang={method})
    said, took = run_tracked(sink, start_limit_s=0.2, finish_limit_s=0.3)
    assert took < 5
    assert said[-1] == "wandb did not finish within 0.3 s and is left behind"
    assert ("abandon",) in sink.calls
    assert len(said) == (3 if method == "start" else 2)


def test_a_slow_start_loses_no_row():
    """What was logged while wandb was starting arrives once it has."""
    sink = Sink(hang={"start"})
    said = []
    tracked = BackgroundTracker(sink, warn=said.append, start_limit_s=0.05)
    tracked.log({"a": 1}, step=1)
    sink.let_go.set()
    tracked.finish({})
    assert ("log", {"progress/step": 1, "a": 1}) in sink.calls
    assert len(said) == 2


def test_a_sink_that_falls_behind_is_switched_off(monkeypatch):
    """Rows do not fill the memory behind a sink that takes none."""
    monkeypatch.setattr(tracker, "_MAX_PENDING_ROWS", 5)
    sink = Sink(hang={"log"})
    said = []
    tracked = BackgroundTracker(sink, warn=said.append, finish_limit_s=0.1)
    for step in range(100):
        tracked.log({}, step=step)
    assert tracked._rows.qsize() <= 6
    assert len(said) == 2
    tracked.finish({})


@pytest.mark.parametrize(("choice", "environment"), [("none", {"WANDB_API_KEY": CANARY}), ("auto", {})])
def test_no_tracker_where_none_is_wanted(tmp_path, monkeypatch, choice, environment):
    """Without a login "auto" is "none", and "none" is none; the caller need not know."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracked = start(tmp_path, choice=choice)
    assert isinstance(tracked, SeveralTrackers)
    tracked.log({"step": 1}, step=1)
    tracked.finish({})


@pytest.mark.parametrize("choice", ["auto", "wandb"])
def test_a_users_disabled_mode_is_respected(tmp_path, monkeypatch, choice):
    """WANDB_MODE=disabled wins over a key and over the config."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    assert isinstance(start(tmp_path, choice=choice), SeveralTrackers)


def test_an_unknown_choice_is_refused(tmp_path):
    """A misspelt tracker is an error before training, not a run without a tracker."""
    with pytest.raises(ConfigError, match="wanbd"):
        start(tmp_path, choice="wanbd")


def test_a_login_by_netrc_counts(tmp_path, monkeypatch):
    """Who ran `wandb login` is logged in, at that server and no other; a broken file is no login."""
    assert not tracker._has_credentials()
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {CANARY}\n")
    assert tracker._has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not tracker._has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://[")
    assert not tracker._has_credentials()
    monkeypatch.delenv("WANDB_BASE_URL")
    (tmp_path / ".netrc").write_text("machine machine machine\n")
    assert not tracker._has_credentials()


def test_a_closed_port_is_no_server(closed_port):
    """Nobody there: known at once."""
    begun = time.monotonic()
    assert "refused" in tracker._why_unreachable(closed_port, limit_s=5)
    assert time.monotonic() - begun < 2


def test_a_listener_that_never_answers_is_no_server(silent_listener):
    """Accepting a connection is not an answer; the limit holds."""
    begun = time.monotonic()
    assert tracker._why_unreachable(silent_listener, limit_s=0.3) is not None
    assert time.monotonic() - begun < 2


def test_a_name_that_takes_for_ever_to_resolve_is_no_server(monkeypatch):
    """The limit covers the look-up of the name too."""
    asked, answer = threading.Event(), threading.Event()

    def look_up(*_args, **_kwargs):
        asked.set()
        answer.wait(20)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    begun = time.monotonic()
    assert tracker._why_unreachable("http://wandb.example.org", limit_s=0.2) == "no answer within 0.2 s"
    assert time.monotonic() - begun < 2
    assert asked.is_set()
    answer.set()


@pytest.mark.parametrize("url", ["wandb.example.org", "ftp://127.0.0.1", "http://[", "http://127.0.0.1:99999"])
def test_a_broken_address_is_no_server(url):
    """A misspelt WANDB_BASE_URL is an answer, not an exception."""
    assert tracker._why_unreachable(url, limit_s=1) is not None


@pytest.mark.parametrize("status", [200, 302, 401, 404, 500])
def test_any_answer_is_a_server(status):
    """Whether it lets us in is for wandb to find out."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()

        def log_message(self, *_args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert tracker._why_unreachable(f"http://127.0.0.1:{server.server_port}", limit_s=5) is None


def test_offline_mode_asks_no_server(monkeypatch):
    """WANDB_MODE=offline is respected without a word to the network, and with nobody logged in."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracker, "_why_unreachable", lambda *_args, **_kwargs: pytest.fail("asked"))
    assert tracker._why_offline() == "WANDB_MODE asks for it"


def test_the_address_in_a_warning_shows_no_password(monkeypatch, closed_port):
    """A base URL may carry a login; the warning names host and port."""
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("WANDB_BASE_URL", closed_port.replace("//", "//user:hunter2@"))
    why = tracker._why_offline()
    assert "127.0.0.1" in why
    assert "hunter2" not in why


def test_the_module_does_without_wandb():
    """Importing the module, and the package round it, does not import wandb: 56 MB that only a tracked run pays for."""
    program = "import sys, dptrain.tracking.tracker; print([name for name in sys.modules if name.startswith('wandb')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout == "[]\n"


class Online:
    """Stands in for accelerate's tracker: keeps what each run was opened with."""

    opened: ClassVar = []

    def __init__(self, project, **options):
        self.options = {"project": project, **options}
        self.tracker = self
        self.id, self.url = options.get("id", f"id-{len(self.opened)}"), "https://wandb.example.org/run"

    def start(self):
        if self.options["settings"].get("mode") != "offline" and "fails" in self.options["project"]:
            raise OSError("no")
        self.opened.append(self.options)

    def define_metric(self, name, *, step_metric):
        self.options["axis"] = (name, step_metric)

    @property
    def dir(self):
        return f"{self.options['dir']}/wandb/offline-run/files"


@pytest.fixture
def online(monkeypatch):
    """A server that answers, as far as the tracker can tell; returns what was opened there."""
    monkeypatch.setattr(Online, "opened", [])
    monkeypatch.setattr("accelerate.tracking.WandBTracker", Online)
    monkeypatch.setitem(sys.modules, "wandb", object())
    monkeypatch.setattr(tracker, "_why_offline", lambda: None)
    return Online.opened


def open_sink(tmp_path, *, project="p"):
    tracker._WandbSink(project=project, run_name="n", run_dir=tmp_path, config={}).start(notify=lambda _text: None)


def test_a_resumed_run_goes_on_under_the_id_it_had(tmp_path, online):
    """The id is kept in the run folder; samples are the axis, so that rows logged twice fall on the same place."""
    open_sink(tmp_path)
    open_sink(tmp_path)
    first, second = online
    assert "id" not in first
    assert (second["id"], second["resume"]) == ("id-0", "allow")
    assert first["axis"] == second["axis"] == ("*", "progress/samples")


@pytest.mark.parametrize("damage", [b"../../x", b"", b"\xff", b"x" * 65, b"a b"])
def test_an_id_that_was_damaged_is_none(tmp_path, online, damage):
    """Then it is a new run, whose id is kept from there on."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run-id").write_bytes(damage)
    open_sink(tmp_path)
    assert "id" not in online[0]
    assert (tmp_path / "wandb" / "run-id").read_text() == "id-0"


def test_an_offline_record_is_a_run_of_its_own(tmp_path, online):
    """Two records under one id could not both be uploaded."""
    open_sink(tmp_path)
    open_sink(tmp_path, project="fails")
    assert "id" not in online[1]
    assert online[1]["settings"]["mode"] == "offline"
    assert (tmp_path / "wandb" / "run-id").read_text() == "id-0"


def test_tensorboard_gets_every_row_without_an_account(tmp_path):
    """Numbers at their steps, and the figures of the whole run, can be read back from its files."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said = []
    tracked = start(tmp_path, choice="tensorboard", said=said)
    for step in (1, 2):
        row = {"kind": "train", "step": step, "train/loss": 1 / step, "noise_scale/state": "resolved", "x": None}
        tracked.log(row, step=step)
    tracked.finish({"steps": 2, "eval_loss": 0.25, "task": "text"})
    found = EventAccumulator(str(next((tmp_path / "tensorboard").iterdir())))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert [event.value for event in found.Scalars("summary/eval_loss")] == [0.25]
    assert any("tensorboard --logdir" in sentence for sentence in said)


def test_several_trackers_all_get_what_one_would(tmp_path, monkeypatch):
    """One that is not installed says so and how to get it, and takes nothing from the other."""
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "trackio", None)
    said = []
    tracked = start(tmp_path, choice="tensorboard+trackio", said=said)
    tracked.log({"kind": "train", "step": 1, "train/loss": 0.5}, step=1)
    tracked.finish({"steps": 1})
    assert list((tmp_path / "tensorboard").rglob("events.*"))
    assert any("trackio is switched off" in text and "pip install trackio" in text for text in said)


@pytest.mark.parametrize("choice", ["tensorboard+tensorboard", "auto+wandb", "comet", ""])
def test_a_list_that_cannot_be_meant_is_refused(choice):
    """Twice the same, auto beside others, unknown names, and nothing."""
    with pytest.raises(ConfigError):
        LogConfigOf(choice)


def LogConfigOf(choice):  # noqa: N802 - reads as the class
    from dptrain.train import LogConfig, TrainConfig

    return TrainConfig(log=LogConfig(tracker=choice))
