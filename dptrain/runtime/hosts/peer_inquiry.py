"""Asks the replicas of several hosts who is still there, once a collective has failed; the collective cannot say."""

from __future__ import annotations

import platform
import sys
import sysconfig
import threading
import time
import traceback
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch.distributed as dist

from dptrain.runtime.rendezvous import open_group_store

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined] # not in __all__

_ANSWER_S = 3.0
"""How long the answers of replicas that live may take. Two hosts with 100 ms of delay answer within 0.5 s."""
_LOOK_S = 1.0  # between two looks whether anybody asks: one word with the store each
_LINGER_S = 0.5  # for the others to read the verdict, before the store may go with rank 0
_MAX_NAMED = 8
_NOT_OF_THE_USER = ("/site-packages/", "/dptrain/", sysconfig.get_path("stdlib"))
_WAITING = ("torch/distributed/", "torch/autograd/graph.py", "torch/_tensor.py", "observe/reduction.py")
"""Files in which the main thread of a replica stands while it waits for the others."""


class PeerInquiry:
    """A thread that tells where this replica stands as soon as any other asks; and the question itself.

    The error of a collective names an address at best, and blames the rank that was waited for first. The store that
    the replicas met at is a second way to each of them: one that answers there lives, and says whether it waits too.
    A frozen or killed one, or one behind a cut link, does not answer. Replicas that share a launcher of ours need no
    such thread: the launcher sees them.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._store: Store | None = None
        self._rank, self._world_size = 0, 1
        self._verdict = ""
        self._asks = False
        self._host_of_store = ""

    def __enter__(self) -> Self:
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
            with suppress(RuntimeError):  # then nobody is asked
                self._store = open_group_store()
        if self._store is not None:
            self._store.set(f"host/{self._rank}", platform.node())
            threading.Thread(target=self._answer, args=(self._store,), name="peer-inquiry", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _answer(self, store: Store) -> None:
        answered = False
        while not self._ended.is_set():
            try:
                if not self._host_of_store and store.check(["host/0"]):
                    self._host_of_store = store.get("host/0").decode()
                if not answered and store.check(["asked"]):
                    if not self._asks:  # else its own collective has failed, and it has said that it waits
                        store.set(f"at/{self._rank}", _place())
                    answered = True
                # Kept, since the store may be gone when this replica's own collective fails: rank 0 serves it.
                if answered and store.check(["verdict"]):
                    self._verdict = store.get("verdict").decode()
                    return
            except RuntimeError:  # the store is gone, and nobody can ask any more
                return
            # Not `Store.wait`, for which torch prints two lines each time that it ends without its key.
            self._ended.wait(_LOOK_S / 10 if answered else _LOOK_S)

    def sentence(self) -> str:
        """Ask all replicas, and say in a sentence who does not answer; empty where nobody can be asked."""
        if self._store is None:
            return ""
        try:
            verdict = self._ask()
        except RuntimeError:
            # The store is gone, and with it who was lost: where a replica dies, the agents of the others end theirs,
            # and rank 0, which serves the store, may go before this one has asked.
            verdict = self._verdict or (
                f"rank 0 on {self._host_of_store} of {self._world_size} did not answer rank {self._rank} on "
                f"{platform.node()}: killed, behind a cut link, or ended since another rank was lost (see its log)"
            )
        return verdict

    def _ask(self) -> str:
        self._asks = True
        store = open_group_store()
        assert store is not None
        store.set(f"at/{self._rank}", "waits")
        if store.check(["verdict"]):
            return store.get("verdict").decode()
        store.set("asked", "")
        answers = self._collect(store)
        verdict = _sentence(answers, hosts=self._hosts(store, answers), world_size=self._world_size)
        store.set("verdict", verdict)
        time.sleep(_LINGER_S)
        return verdict

    def _collect(self, store: Store) -> dict[int, str | None]:
        deadline_s = time.monotonic() + _ANSWER_S
        keys = [f"at/{rank}" for rank in range(self._world_size)]
        while not store.check(keys) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return {rank: store.get(key).decode() if store.check([key]) else None for rank, key in enumerate(keys)}

    def _hosts(self, store: Store, answers: dict[int, str | None]) -> dict[int, str]:
        asked = [rank for rank, answer in answers.items() if answer != "waits"][: _MAX_NAMED + 1]
        return {
            rank: store.get(f"host/{rank}").decode() if store.check([f"host/{rank}"]) else "an unknown host"
            for rank in asked
        }


def _sentence(answers: dict[int, str | None], *, hosts: dict[int, str], world_size: int) -> str:
    silent = [rank for rank, answer in answers.items() if answer is None]
    if silent:
        named = ", ".join(f"{rank} on {hosts[rank]}" for rank in silent[:_MAX_NAMED])
        more = f" and {len(silent) - _MAX_NAMED} more" if len(silent) > _MAX_NAMED else ""
        verb = "rank" if len(silent) == 1 else "ranks"
        return f"{verb} {named}{more} of {world_size} did not answer: killed, frozen, or behind a cut link"
    absent = [f"rank {rank} on {hosts[rank]} is {answer}" for rank, answer in answers.items() if answer != "waits"]
    if absent:
        return f"all {world_size} ranks answer, but not all wait: {'; '.join(absent[:_MAX_NAMED])}"
    return f"all {world_size} ranks answer and wait: the link between two of them was cut"


def _place() -> str:
    """Return "waits", or the innermost line of the main thread that is the user's, or just the innermost."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)  # noqa: SLF001 - documented, no other way
    stack = traceback.extract_stack(frame) if frame is not None else None
    if not stack or any(part in stack[-1].filename for part in _WAITING):
        return "waits"
    own = [entry for entry in stack if not any(part in entry.filename for part in _NOT_OF_THE_USER)]
    entry = own[-1] if own and not own[-1].filename.startswith("<") else stack[-1]
    return f"at {entry.filename}, line {entry.lineno}, in {entry.name}"
