"""Who of the replicas does not answer: asked over the store that they met at, when a collective has failed."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch.distributed as dist

from dptrain.runtime.hosts import peer_inquiry
from dptrain.runtime.hosts.peer_inquiry import PeerInquiry


@pytest.fixture
def replicas(monkeypatch):
    """Make replicas that share a store in this process; `start(rank)` starts the thread of one, on host "h"."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(
        peer_inquiry,
        "open_group_store",
        lambda: dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False),
    )
    monkeypatch.setattr(peer_inquiry, "_LOOK_S", 0.02)
    monkeypatch.setattr(peer_inquiry, "_ANSWER_S", 0.5)
    monkeypatch.setattr(peer_inquiry.platform, "node", lambda: "h")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    started = []

    def start(rank, *, world_size=3):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
        started.append(PeerInquiry().__enter__())
        return started[-1]

    yield start
    for inquiry in started:
        inquiry.__exit__(None, None, None)


def test_who_does_not_answer_is_named_with_its_host(replicas, monkeypatch):
    """Rank 2 was there, and is gone; rank 1 answers."""
    replicas(2).__exit__(None, None, None)
    time.sleep(0.1)  # its thread looks fifty times a second
    replicas(1)
    asker = replicas(0)
    monkeypatch.setattr(peer_inquiry, "_place", lambda: "waits")
    assert asker.sentence() == "rank 2 on h of 3 did not answer: killed, frozen, or behind a cut link"


def test_who_is_elsewhere_is_reported_with_the_place(replicas, monkeypatch):
    """All answer, and one is not in a collective: that one is what the others wait for."""
    replicas(1)
    replicas(2)
    asker = replicas(0)
    monkeypatch.setattr(peer_inquiry, "_place", lambda: "at data.py, line 7, in __getitem__")
    sentence = asker.sentence()
    assert sentence.startswith(
        "all 3 ranks answer, but not all wait: rank 1 on h is at data.py, line 7, in __getitem__"
    )


def test_where_all_wait_a_link_was_cut(replicas, monkeypatch):
    """Each is reached by the store, and each waits for another."""
    replicas(1, world_size=2)
    asker = replicas(0, world_size=2)
    monkeypatch.setattr(peer_inquiry, "_place", lambda: "waits")
    assert asker.sentence() == "all 2 ranks answer and wait: the link between two of them was cut"


def test_a_store_that_is_gone_is_said(replicas, monkeypatch):
    """This side of a cut link does not reach the host of the store."""
    replicas(0)
    asker = replicas(1)
    deadline_s = time.monotonic() + 10
    while not asker._host_of_store:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def unreachable():
        return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=peer_inquiry_timeout)

    import datetime as dt

    peer_inquiry_timeout = dt.timedelta(seconds=0.2)
    monkeypatch.setattr(peer_inquiry, "open_group_store", unreachable)
    assert asker.sentence() == (
        "rank 0 on h of 3 did not answer rank 1 on h: killed, behind a cut link, or ended since another rank was lost "
        "(see its log)"
    )


def test_who_fails_later_says_what_was_found_first(replicas, monkeypatch):
    """Rank 0, which serves the store, has asked and ended: rank 1 tells its verdict, and blames nobody else."""
    monkeypatch.setattr(peer_inquiry, "_place", lambda: "waits")
    later = replicas(1)
    found = replicas(0).sentence()
    assert "rank 2 on" in found
    deadline_s = time.monotonic() + 10
    while not later._verdict:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)

    def gone():
        raise RuntimeError("no store")

    monkeypatch.setattr(peer_inquiry, "open_group_store", gone)
    assert later.sentence() == found


def test_who_is_alone_asks_nobody():
    """Without a group, or with a launcher that sees all."""
    with PeerInquiry() as inquiry:
        assert inquiry.sentence() == ""


def test_the_place_is_the_users_line():
    """The innermost line that is neither torch's nor dptrain's."""
    found = []

    def ask():
        found.append(peer_inquiry._place())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "test_peer_inquiry.py" in found[0]
