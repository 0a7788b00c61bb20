"""The launcher of one node, with replicas that are a few lines each: how they are started, asked to stop, and ended."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from dptrain.errors import ConfigError, PeerLostError
from dptrain.runtime import launcher as replicas
from dptrain.runtime.failure_report import write_failure, write_outcome
from dptrain.runtime.launcher import count_gpus, is_replica, is_silent_replica, start_replicas


@pytest.mark.parametrize(
    ("environment", "replica", "silent"),
    [
        ({}, False, False),
        ({"RANK": "1"}, False, False),
        ({"WORLD_SIZE": "2"}, False, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, True, True),
    ],
)
def test_a_replica_knows_that_it_is_one(environment, replica, silent):
    """By what every launcher sets; the first of them speaks for all."""
    assert is_replica(environment) is replica
    assert is_silent_replica(environment) is silent


@pytest.mark.parametrize(("num_gpus", "cpu", "expected"), [(0, False, 0), (4, False, 4), (4, True, 0)])
def test_gpus_count_where_they_may_be_used(monkeypatch, num_gpus, cpu, expected):
    """On the CPU nobody asks for them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert count_gpus(cpu=cpu) == expected


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"num_replicas": 0}, "--replicas must be at least 1, got 0"),
        ({"num_replicas": 1025}, "--replicas must be at most 1024 on one host, got 1025"),
        ({"num_replicas": int("1" * 80)}, "--replicas must be at most 1024 on one host, got 1111111111"),
        ({"num_replicas": -3}, "--replicas must be at least 1, got -3"),
        ({"max_restarts": -1}, "--max-restarts must be at least 0, got -1"),
        ({"grace_s": 0.0}, "--grace must be a number of seconds above 0, got 0"),
        ({"grace_s": float("nan")}, "--grace must be a number of seconds above 0, got nan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tmp_path, numbers, words):
    """Before anything is started."""
    with pytest.raises(ConfigError, match=words):
        start_replicas([], run_dir=tmp_path, **{"num_replicas": 2, **numbers})


# Replicas of a few lines


@pytest.fixture
def launch(monkeypatch, tmp_path, capfd):
    """Start copies of this process that run `body(rank, attempt)` as replicas; return exit code and output."""
    monkeypatch.setattr(replicas, "load_for_all", lambda: None)

    def start(body, *, arguments=(), num_replicas=2, reports=True, **settings):
        def run_module(_name, *, run_name):
            assert run_name == "__main__"
            code = body(int(os.environ["RANK"]), int(os.environ["DPTRAIN_ATTEMPT"]))
            if reports and code in (None, 0, 75):
                write_outcome(code or 0)
            raise SystemExit(code)

        monkeypatch.setattr("runpy.run_module", run_module)
        began_s = time.monotonic()
        code = start_replicas(list(arguments), num_replicas=num_replicas, run_dir=tmp_path / "run", **settings)
        start.took_s = time.monotonic() - began_s
        return code, capfd.readouterr().err

    return start


def note(path):
    """Write what a replica sees."""
    seen = {"pid": os.getpid(), "sid": os.getsid(0), "environment": dict(os.environ), "arguments": replicas.sys.argv}
    path.write_text(json.dumps(seen))


def test_each_replica_gets_its_place_and_its_share_of_the_cores(launch, tmp_path, monkeypatch):
    """A place, one meeting point for all in a folder that nobody else can enter, a session, loopback alone."""
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)

    def body(rank, attempt):
        store = Path(os.environ["DPTRAIN_STORE"])
        assert store.parent.stat().st_mode & 0o777 == 0o700
        note(tmp_path / f"{rank}.json")

    assert launch(body, arguments=["train", "--seed", "1"], num_replicas=3) == (0, "")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    for rank, replica in enumerate(seen):
        environment = replica["environment"]
        assert (environment["RANK"], environment["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert environment["OMP_NUM_THREADS"] == str(max(1, os.cpu_count() // 3))
        assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == "lo"
        assert environment["PYTHONFAULTHANDLER"] == "1"
        assert replica["sid"] == replica["pid"]
        assert replica["arguments"] == ["dptrain", "train", "--seed", "1"]
    stores = {replica["environment"]["DPTRAIN_STORE"] for replica in seen}
    assert len(stores) == 1
    assert not Path(*stores).parent.exists()


def test_what_the_user_set_stays(launch, tmp_path, monkeypatch):
    """Numbers of threads and interfaces are somebody's measurement."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert launch(lambda *_: note(tmp_path / "seen"), num_replicas=1)[0] == 0
    environment = json.loads((tmp_path / "seen").read_text())["environment"]
    assert (environment["OMP_NUM_THREADS"], environment["GLOO_SOCKET_IFNAME"]) == ("7", "eth0")


def test_a_fresh_interpreter_gets_the_same(launch, tmp_path, monkeypatch):
    """Where replicas are not copies of the launcher, they are started by the same Python with the same environment."""
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\necho "$@ $RANK/$WORLD_SIZE $DPTRAIN_ATTEMPT" > {tmp_path}/seen$RANK\n'
        'printf 0 > "$(dirname "$DPTRAIN_STORE")/outcome-$RANK"\n'
    )
    program.chmod(0o700)
    monkeypatch.setattr(replicas.sys, "executable", str(program))
    assert launch(lambda *_: 3, arguments=["train", "--resume"], fork=False) == (0, "")
    for rank in range(2):
        assert (tmp_path / f"seen{rank}").read_text() == f"-m dptrain train --resume {rank}/2 0\n"


def stay():
    """Be a replica that does not end of itself."""
    time.sleep(60)


def test_when_one_ends_badly_the_others_do_not_stay(launch):
    """They have two seconds, in which they may say something; the cause is reported, with its code."""

    def body(rank, attempt):
        return 3 if rank else stay()

    code, reported = launch(body, max_restarts=0)
    assert (code, reported) == (
        3,
        "dptrain train: replica 1 of 2 ended with exit code 3 and left no reason; --max-restarts is 0\n",
    )
    assert launch.took_s < 10


def test_the_cause_may_take_longer_than_its_consequence(launch, monkeypatch):
    """A replica that another has brought down ends first; the other's reason is waited for."""
    monkeypatch.setattr(replicas, "_LAST_WORDS_S", 0.1)

    def body(rank, attempt):
        if rank == 0:
            time.sleep(1)
        write_failure(PeerLostError("closed by peer") if rank else ConfigError("no such thing"))
        return 70 if rank else 2

    assert launch(body) == (2, "dptrain train: no such thing\n")


def test_a_hang_is_not_waited_for(launch):
    """Where one says that another does not answer, the other has nothing to say."""

    def body(rank, attempt):
        if rank:
            stay()
        write_failure(PeerLostError("Timed out waiting"))
        return 70

    code, reported = launch(body, max_restarts=0)
    assert code == 71
    assert "replica 1 of 2 did not answer any more, and had to be killed" in reported
    assert launch.took_s < 10


def test_nothing_is_left_behind(launch, tmp_path):
    """Not even processes that a replica has started and not ended."""

    def body(rank, attempt):
        if rank == 0:
            child = os.fork()
            if child == 0:
                stay()
            (tmp_path / "child").write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)
        stay()

    code, reported = launch(body, max_restarts=0)
    assert code == 128 + signal.SIGKILL
    assert "replica 0 of 2 was killed by SIGKILL" in reported
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Attempts


def test_a_restart_says_why_and_from_where_and_resumes_what_is_there(launch, tmp_path):
    """The first restart finds no run and begins anew; the second goes on from the checkpoint of the first."""
    run = tmp_path / "run"

    def body(rank, attempt):
        note(tmp_path / f"{attempt}-{rank}.json")
        if attempt == 1 and rank == 0:
            (run / "checkpoints" / "step-000000000012").mkdir(parents=True)
            (run / "config.yaml").touch()
        if attempt < 2 and rank == 1:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)

    code, reported = launch(body, arguments=["train"])
    assert code == 0
    assert reported.splitlines() == [
        "dptrain train: replica 1 of 2 was killed by SIGKILL; starting again from the beginning",
        "dptrain train: replica 1 of 2 was killed by SIGKILL; starting again from step 12",
    ]
    seen = [json.loads((tmp_path / f"{attempt}-0.json").read_text()) for attempt in range(3)]
    assert ["--resume" in attempt["arguments"] for attempt in seen] == [False, False, True]
    assert len({attempt["environment"]["DPTRAIN_STORE"] for attempt in seen}) == 3


def test_it_gives_up_in_the_end(launch, tmp_path):
    """After three restarts without a checkpoint; the sentence says why it gives up."""

    def body(rank, attempt):
        (tmp_path / f"{attempt}").touch()
        write_failure(ValueError(f"poison {attempt}"))
        return 1

    code, reported = launch(body)
    assert code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
    assert reported.count("replica 0 of 2 failed with ValueError: poison") == 4
    assert reported.splitlines()[-1] == (
        "dptrain train: replica 0 of 2 failed with ValueError: poison 3; "
        "3 restarts in a row have brought no checkpoint at all"
    )


def test_a_bug_at_the_same_step_is_shown_twice_not_four_times(launch, tmp_path):
    """The same exception at the same step in two attempts ends the run, whichever samples each replica had there."""

    def body(rank, attempt):
        (tmp_path / f"{attempt}").touch()
        error = ValueError("bad sample")
        error.add_note(f"in step 1,012, samples {rank}, {rank + 2}")
        write_failure(error)
        return 1

    code, reported = launch(body)
    assert code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert "the same error at the same step as in the attempt before" in reported.splitlines()[-1]


# Signals


@pytest.fixture
def send(tmp_path):
    """Send signals to this process, the launcher, when both replicas are ready: pairs of a delay and a signal."""
    threads = []

    def later(*signals):
        def run():
            while len(list(tmp_path.glob("ready*"))) < 2:
                time.sleep(0.01)
            for delay_s, number in signals:
                time.sleep(delay_s)
                os.kill(os.getpid(), number)

        threads.append(threading.Thread(target=run))
        threads[0].start()

    yield later
    for thread in threads:
        thread.join()


def obedient(tmp_path, *, code=75):
    """A replica that notes each signal, and ends at a request to stop."""

    def body(rank, attempt):
        numbers = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, _: numbers.append(number))
        (tmp_path / f"ready{rank}").touch()
        while not {signal.SIGINT, signal.SIGTERM} & set(numbers):
            time.sleep(0.01)
        time.sleep(0.2)  # were the signal passed on twice, the second would come now
        (tmp_path / f"got{rank}").write_text(" ".join(signal.Signals(number).name for number in numbers))
        return code

    return body


@pytest.mark.parametrize(("sent", "got"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")])
def test_a_request_to_stop_is_passed_on_once(launch, send, tmp_path, sent, got):
    """As it came, except that a replica has no terminal that could hang up; 75, since all say that they have saved."""
    send((0, signal.Signals[sent]))
    assert launch(obedient(tmp_path)) == (75, "")
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == [got, got]


def test_a_request_to_save_is_passed_on_and_stops_nobody(launch, send, tmp_path):
    """SIGUSR1, any number of times, long before the end."""
    send((0, signal.SIGUSR1), (0.5, signal.SIGTERM))
    assert launch(obedient(tmp_path)) == (75, "")
    assert (tmp_path / "got0").read_text() == "SIGUSR1 SIGTERM"


def test_who_did_not_save_is_not_said_to_have(launch, send, tmp_path):
    """Replicas that were stopped before they could listen die of the signal, and the exit code says so."""

    def body(rank, attempt):
        (tmp_path / f"ready{rank}").touch()
        stay()

    send((0, signal.SIGTERM))
    code, reported = launch(body)
    assert code == 128 + signal.SIGTERM
    assert reported == "dptrain train: stopped on request before a step was saved: there is nothing to resume\n"


def test_a_stop_before_the_first_step_of_a_resumed_run_loses_nothing(launch, send, tmp_path):
    """Replicas that die of Ctrl-C while they start leave the checkpoint that was there: 75, to be resumed."""
    (tmp_path / "run" / "checkpoints" / "step-000000000012").mkdir(parents=True)

    def body(rank, attempt):
        (tmp_path / f"ready{rank}").touch()
        stay()

    send((0, signal.SIGINT))
    assert launch(body) == (75, "dptrain train: stopped on request before a further step was saved; step 12 is saved\n")


@pytest.mark.parametrize("code", [None, 0, 75])
def test_an_exit_code_is_no_report_of_an_end(launch, code):
    """Whatever ends a process with 0 or 75 (`sys.exit()` in a library, `os._exit`) ends no run: that is a failure."""
    found, reported = launch(lambda *_: code, reports=False, max_restarts=0)
    assert found == 70
    assert f"ended with exit code {code or 0} before its trainer had reported an end" in reported


def test_what_goes_wrong_after_the_end_is_a_warning(launch):
    """All trainers reported their end, and then one was killed while it drew the report: the run is done."""

    def body(rank, attempt):
        write_outcome(0)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    assert launch(body, reports=False) == (
        0,
        "dptrain train: warning: replica 0 of 2 was killed by SIGKILL afterwards; the run is done\n",
    )


def deaf(tmp_path):
    """A replica that obeys nothing."""

    def body(rank, attempt):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        (tmp_path / f"ready{rank}").touch()
        stay()

    return body


def test_the_grace_ends(launch, send, tmp_path):
    """Who does not stop is killed, not silently, and not started again."""
    send((0, signal.SIGTERM))
    assert launch(deaf(tmp_path), grace_s=1.0) == (
        71,
        "dptrain train: replicas 0, 1 of 2 could not stop in time, and had to be killed\n",
    )
    assert 1 <= launch.took_s < 10


def test_a_second_request_after_a_while_means_it(launch, send, tmp_path, monkeypatch):
    """It shortens a long grace to a second; one that comes at once is the same request."""
    monkeypatch.setattr(replicas, "_REPEAT_S", 0.5)
    send((0, signal.SIGINT), (0.1, signal.SIGINT), (0.8, signal.SIGINT))
    code, _ = launch(deaf(tmp_path), grace_s=60.0)
    assert code == 71
    assert 1.5 < launch.took_s < 10


def test_a_stopped_run_is_not_started_again(launch, send, tmp_path):
    """A replica that crashes on the way out is reported, and that is the end."""
    send((0, signal.SIGTERM))
    code, reported = launch(obedient(tmp_path, code=1))
    assert (code, reported) == (1, "dptrain train: replica 0 of 2 ended with exit code 1 and left no reason\n")


def test_the_handlers_are_those_from_before(launch):
    """Also those that ignore: what `nohup` has set stays."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        assert launch(lambda *_: 0)[0] == 0
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    finally:
        signal.signal(signal.SIGHUP, before)
