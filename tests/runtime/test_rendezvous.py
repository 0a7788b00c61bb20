"""How replicas find one another: each way of not meeting is one sentence, in the time that was given for it."""

from __future__ import annotations

import datetime as dt
import logging
import os
import socket
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from dptrain.errors import ConfigError, RendezvousError
from dptrain.runtime import rendezvous as meeting
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
        ({1}, "waited 0.3 s for rank 1 of 3"),
        ({1, 2}, "waited 0.3 s for ranks 1, 2 of 3"),
        (set(range(1, 13)), "waited 0.3 s for ranks 1, 2, 3, 4, 5, 6, 7, 8 and 4 more of 13"),
    ],
)
def test_who_is_missing_is_named(place, tmp_path, missing, words):
    """After the time for joining, not after half an hour."""
    world_size = max(3, len(missing) + 1)
    store = dist.FileStore(str(tmp_path / "store"), world_size)
    for rank in set(range(1, world_size)) - missing:  # who came already
        store.set(f"came/{rank}", "")
        store.add("number", 1)
    place(RANK=0, WORLD_SIZE=world_size, DPTRAIN_STORE=tmp_path / "store")
    sentence, took_s = refused()
    assert words in sentence
    assert "unset" not in sentence  # a launcher of ours leaves nothing over
    assert 0.3 <= took_s < 2


def test_variables_left_over_are_explained(place):
    """A process that nobody started as a replica waits for others in vain, and learns why."""
    place(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    sentence, took_s = refused()
    assert "waited 0.3 s for rank 1 of 2" in sentence
    assert sentence.endswith("the variables are left over from one: `unset RANK WORLD_SIZE`")
    assert took_s < 2


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
    assert took_s < 0.3


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
    with pytest.raises(RendezvousError, match=r"waited 0\.2 s"):
        rendezvous(device="cpu")
    kept = {}
    monkeypatch.setattr(meeting.dist, "init_process_group", lambda _, **given: kept.update(given))
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
