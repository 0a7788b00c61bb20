"""How replicas find one another: each way of not meeting is one sentence, in the time that was given for it."""

from __future__ import annotations

import datetime as dt
import logging
import os
import re
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from dptrain.errors import ConfigError, RendezvousError
from dptrain.runtime import rendezvous as rendezvous_module
from dptrain.runtime.rendezvous import rendezvous
from tests.replicas import run_replicas


@pytest.fixture
def place(monkeypatch):
    """Set the variables of a launcher; others are not set."""
    for name in ("MASTER_ADDR", "MASTER_PORT", "DPTRAIN_STORE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("DPTRAIN_JOIN_TIMEOUT_S", "DPTRAIN_COLLECTIVE_TIMEOUT_S", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)

    def put(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    yield put
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refused():
    """Return the sentence, and the seconds that it took."""
    began_s = time.monotonic()
    patience = mock.patch.dict(os.environ, DPTRAIN_JOIN_TIMEOUT_S="0.3")
    with patience, pytest.raises(RendezvousError) as caught:
        rendezvous(device="cpu")
    assert not dist.is_initialized()
    assert "\n" not in str(caught.value)
    return str(caught.value), time.monotonic() - began_s


def test_one_replica_meets_itself(place, tmp_path):
    """By a file that nobody else needs to see; afterwards there is a group of one, with gloo."""
    place(RANK=0, WORLD_SIZE=1, DPTRAIN_STORE=tmp_path / "store")
    rendezvous(device="cpu")
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
    rendezvous(device="cpu")  # there is a group already


def test_what_torchrun_sets_is_enough(place):
    """An address and a port; no agent that serves the store."""
    place(RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    rendezvous(device="cpu")
    assert dist.get_world_size() == 1


def meet_again(rank, world_size, folder, port):
    """Meet by file and by port; return the sums that the groups compute."""
    sums = []
    for variables in ({"DPTRAIN_STORE": str(folder / "store")}, {"DPTRAIN_STORE": "", "MASTER_PORT": str(port)}):
        dist.destroy_process_group()
        os.environ.update(variables)
        rendezvous(device="cpu")
        value = torch.tensor(float(rank))
        dist.all_reduce(value)
        dist.barrier()
        sums.append((value.item(), dist.get_world_size()))
    return sums


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({1}, "timed out after 0.3 s waiting for rank 1 of 3"),
        ({1, 2}, "timed out after 0.3 s waiting for ranks 1, 2 of 3"),
        (set(range(1, 13)), "timed out after 0.3 s waiting for ranks 1, 2, 3, 4, 5, 6, 7, 8 and 4 more of 13"),
    ],
)
def test_who_is_missing_is_named(place, tmp_path, missing, words):
    """After the time for joining, not after half an hour."""
    world_size = max(3, len(missing) + 1)
    store = dist.PrefixStore("dptrain", dist.FileStore(str(tmp_path / "store"), world_size))
    for rank in set(range(1, world_size)) - missing:  # who came already
        store.set(f"came/{rank}", f"{world_size} token{rank}")
    place(RANK=0, WORLD_SIZE=world_size, DPTRAIN_STORE=tmp_path / "store")
    sentence, took_s = refused()
    assert words in sentence
    assert "unset" not in sentence  # a launcher of ours leaves nothing over
    assert 0.3 <= took_s < 5


def test_variables_left_over_are_explained(place):
    """A process that nobody started as a replica times out waiting for others, and learns why."""
    place(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    sentence, took_s = refused()
    assert "timed out after 0.3 s waiting for rank 1 of 2" in sentence
    assert sentence.endswith("the variables are left over from one: `unset RANK WORLD_SIZE`")
    assert took_s < 5


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": 0, "WORLD_SIZE": 2}, "but not MASTER_ADDR and MASTER_PORT"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 and WORLD_SIZE=2 do not go together"),
        ({"RANK": 0, "WORLD_SIZE": 0}, "RANK=0 and WORLD_SIZE=0 do not go together"),
        ({"RANK": "one", "WORLD_SIZE": 2}, "RANK=one in the environment is not a number"),
        ({"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "a", "MASTER_PORT": "-1"}, "MASTER_PORT=-1 in the environment"),
    ],
)
def test_half_a_place_is_no_place(place, variables, words):
    """Refused at once, with the remedy."""
    place(**variables)
    sentence, took_s = refused()
    assert words in sentence
    assert "`unset RANK WORLD_SIZE`" in sentence
    assert took_s < 2


def test_a_port_in_use_is_named(place):
    """At once, with the remedy."""
    with socket.create_server(("0.0.0.0", 0)) as taken:  # noqa: S104 - held on all addresses, as a server does
        port = taken.getsockname()[1]
        place(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        sentence, took_s = refused()
    assert f"port {port}, where the replicas are to meet, is in use: set MASTER_PORT to a free one" in sentence
    assert took_s < 5


@pytest.mark.parametrize("address", ["127.0.0.1", "n" * 70])
def test_an_address_where_nobody_is(place, address):
    """A host without rank 0, or a name that no resolver can have: within the time for joining, more or less."""
    port = free_port()
    place(RANK=1, WORLD_SIZE=2, MASTER_ADDR=address, MASTER_PORT=port)
    sentence, took_s = refused()
    assert f"replica 1 of 2 could not reach rank 0 at {address}:{port} within 0.3 s" in sentence
    assert took_s < 5


def test_an_interface_that_does_not_exist_is_named(place, tmp_path):
    """With the variable that names it."""
    place(RANK=0, WORLD_SIZE=1, DPTRAIN_STORE=tmp_path / "store", GLOO_SOCKET_IFNAME="nope0")
    sentence, _ = refused()
    assert "GLOO_SOCKET_IFNAME is 'nope0': is that a network interface of this machine?" in sentence


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_times_that_are_none_are_refused(place, value):
    """Before anybody is waited for."""
    place(RANK=0, WORLD_SIZE=2, DPTRAIN_JOIN_TIMEOUT_S=value)
    with pytest.raises(ConfigError, match=f"DPTRAIN_JOIN_TIMEOUT_S={value} in the environment must be"):
        rendezvous(device="cpu")


def test_times_come_from_the_environment(place, tmp_path, monkeypatch):
    """The one for joining, and the one for what comes later, which the group keeps."""
    place(RANK=0, WORLD_SIZE=2, DPTRAIN_STORE=tmp_path / "store", DPTRAIN_JOIN_TIMEOUT_S="0.2")
    with pytest.raises(RendezvousError, match=r"timed out after 0\.2 s"):
        rendezvous(device="cpu")
    kept = {}
    monkeypatch.setattr(rendezvous_module.dist, "init_process_group", lambda _, **given: kept.update(given))
    place(RANK=0, WORLD_SIZE=1, DPTRAIN_STORE=tmp_path / "other", DPTRAIN_COLLECTIVE_TIMEOUT_S="7")
    rendezvous(device="cpu")
    assert kept["timeout"] == dt.timedelta(seconds=7)


@pytest.mark.parametrize(("local", "warnings"), [(1, 0), (None, 0), (0, 1)])
def test_several_nodes_are_warned_of_their_network(place, tmp_path, monkeypatch, caplog, local, warnings):
    """Once, by rank 0, and only where there are replicas on another node."""
    place(
        RANK=0, WORLD_SIZE=1, DPTRAIN_STORE=tmp_path / "store", **({} if local is None else {"LOCAL_WORLD_SIZE": local})
    )
    with caplog.at_level(logging.WARNING):
        rendezvous(device="cpu")
    assert [record.getMessage().count("a network that you trust") for record in caplog.records] == [1] * warnings


def test_replicas_meet_by_file_and_by_port(tmp_path):
    """All of them, and can talk."""
    assert run_replicas(meet_again, world_size=2, args=(tmp_path, free_port())) == [[(1.0, 2), (1.0, 2)]] * 2


# A store that outlives an attempt, as that of an agent of torchrun


def meet_over(store, *, rank, world_size, timeout_s=10.0):
    """Agree on a group in a thread; returns a function that waits for its name, or raises what it raised."""
    found = []

    def agree():
        deadline_s = time.monotonic() + timeout_s
        try:
            found.append(
                rendezvous_module._agree_on_group(store, rank=rank, world_size=world_size, deadline_s=deadline_s)
            )
        except BaseException as error:  # noqa: BLE001 - whatever it was, it is raised where it is asked for
            found.append(error)

    thread = threading.Thread(target=agree)
    thread.start()

    def name():
        thread.join(timeout=20)
        assert found, "it still waits"
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    return name


@pytest.fixture
def agent_store():
    """Give a connection to one and the same store for each caller."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)


def test_each_attempt_over_one_store_is_a_group_of_its_own(agent_store):
    """Three attempts, whose keys all stay: each has a new name, which all of its replicas know, and no other."""
    names = []
    for _ in range(3):
        waiting = [meet_over(agent_store(), rank=rank, world_size=3) for rank in range(3)]
        found = {name() for name in waiting}
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3


def test_replicas_meet_whatever_their_agents_have_counted(agent_store, monkeypatch):
    """A host that is started anew counts no restarts, and the others count one: they meet all the same."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    first = [meet_over(agent_store(), rank=rank, world_size=2) for rank in range(2)]
    assert len({name() for name in first}) == 1
    survivor = meet_over(agent_store(), rank=0, world_size=2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    returned = meet_over(agent_store(), rank=1, world_size=2)
    assert survivor() == returned()


def test_who_died_while_it_waited_is_replaced(agent_store):
    """A replica that came and accepted before it died does not count: the group is named anew for the next one."""
    store = agent_store()
    store.set("came/1", "2 dead")
    waiting = meet_over(agent_store(), rank=0, world_size=2)
    store.wait(["invited/dead"], dt.timedelta(seconds=10))
    replaced = meet_over(agent_store(), rank=1, world_size=2)
    assert waiting() == replaced()


def test_an_attempt_of_another_size_is_no_part_of_this_one(agent_store):
    """Of three replicas that met, two meet again; the keys of the third do not matter."""
    for world_size in (3, 2, 3):
        waiting = [meet_over(agent_store(), rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({name() for name in waiting}) == 1


def test_a_rank_that_was_started_twice_is_refused(agent_store):
    """Two processes that both take themselves for rank 0: the earlier one says so instead of waiting."""
    first = meet_over(agent_store(), rank=0, world_size=2)
    store = agent_store()
    store.wait(["came/0"], dt.timedelta(seconds=10))
    store.set("came/0", "2 other")
    store.set("came/1", "2 another")
    with pytest.raises(RendezvousError, match="one rank cannot be started twice"):
        first()


def test_a_torchrun_that_lives_is_not_taken_for_a_left_over(place, monkeypatch):
    """Under a live launcher `unset RANK` would be wrong advice, and is not given."""
    place(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), TORCHELASTIC_RUN_ID="job")
    assert "unset RANK" in refused()[0]
    monkeypatch.setattr(rendezvous_module, "launcher_process", object)
    place(MASTER_PORT=free_port())
    sentence, _ = refused()
    assert sentence == "timed out after 0.3 s waiting for rank 1 of 2; check its log"


SCRIPT = (Path(__file__).parents[2] / "launch" / "torchrun.sh").read_text()


@pytest.mark.parametrize(
    "words",
    [
        re.search(r"^exec (.*)", SCRIPT, re.MULTILINE)[1].split(),
        ["python", "/opt/bin/torchrun", "--standalone"],
        ["python", "-m", "torch.distributed.run"],
        ["/opt/bin/python3", "/opt/bin/accelerate", "launch"],
    ],
)
def test_the_process_that_started_a_replica_is_known_by_its_command(monkeypatch, words):
    """What `launch/torchrun.sh` becomes among them; a shell between it and the replica is passed over."""
    shell, launcher = SimpleNamespace(cmdline=lambda: ["bash"]), SimpleNamespace(cmdline=lambda: words)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parents=lambda: [shell, launcher]))
    assert rendezvous_module.launcher_process() is launcher
