"""How replicas find one another: who is missing is named after two minutes instead of half an hour; trains nothing."""

from __future__ import annotations

import datetime as dt
import logging
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # not in __all__

from dptrain.errors import ConfigError, RendezvousError

_JOIN_TIMEOUT_S = 120.0
_COLLECTIVE_TIMEOUT_S = 300.0  # a replica that hangs must not hold the others for torch's half hour
_MAX_NAMED = 8
_STORE_S = 5.0  # for one answer of the store, once replicas have met
_LONGEST_POLL_S = 0.5  # between two looks at the store, while others are still to come
_NUM_ANCESTORS = 3  # a shell or a wrapper may stand between a launcher and a replica

_log = logging.getLogger(__name__)


def collective_timeout_s() -> float:
    """Return the longest wait for another replica in a collective: DPTRAIN_COLLECTIVE_TIMEOUT_S, or 300 seconds.

    Raises:
        ConfigError: where the variable is no number of seconds.
    """
    return _seconds("DPTRAIN_COLLECTIVE_TIMEOUT_S", default=_COLLECTIVE_TIMEOUT_S)


def rendezvous(*, device: str = "auto", share_devices: bool = False) -> None:
    """Make the process group of this replica and all others; nothing where there is one already.

    Replicas that `dptrain train` started meet by a file (DPTRAIN_STORE), and nobody can listen in. Others, such as
    those of torchrun, meet at MASTER_ADDR and MASTER_PORT. The longest wait for a replica to come is
    DPTRAIN_JOIN_TIMEOUT_S, or 120 seconds; later on it is `collective_timeout_s`.

    Args:
        device: "cpu", or "auto" for GPUs where there are some.
        share_devices: gloo on GPUs, too: NCCL takes one replica per device.

    Raises:
        RendezvousError: naming the replicas that did not come, or what keeps this one from reaching them.
        ConfigError: where a variable of the environment is no number.
    """
    if dist.is_initialized():
        return
    join_s = _seconds("DPTRAIN_JOIN_TIMEOUT_S", default=_JOIN_TIMEOUT_S)
    collective_s = collective_timeout_s()
    rank, world_size = _place()
    store = _open_store(rank=rank, world_size=world_size, timeout_s=join_s)
    deadline_s = time.monotonic() + join_s
    try:
        name = _agree_on_group(store, rank=rank, world_size=world_size, deadline_s=deadline_s)
    except TimeoutError:
        raise RendezvousError(
            f"timed out after {join_s:g} s waiting for {_missing(store, rank=rank, world_size=world_size)} of "
            f"{world_size}; check its log{_if_left_over(world_size)}"
        ) from None
    backend = _backend(device, share_devices=share_devices)
    _connect(store, name=name, backend=backend, rank=rank, world_size=world_size, timeout_s=collective_s)
    if rank == 0 and world_size > _number("LOCAL_WORLD_SIZE", default=world_size):
        _log.warning(
            "the replicas of several nodes talk without encryption or password: let them do so only on a network "
            "that you trust"
        )


def open_group_store() -> Store | None:
    """Return a further connection to the store of the present group, for a thread of its own.

    A wait on a connection keeps everybody else who uses it waiting, so that the group's own cannot be shared.

    Returns:
        None without a group, or where the replicas met by a file: then one launcher sees them all.
    """
    return None if _group is None or "DPTRAIN_STORE" in os.environ else _group.connect()


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The group that this replica has joined: what is needed to reach its store once more."""

    name: str
    world_size: int

    def connect(self) -> Store:
        """Return the group's store over a connection of its own."""
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            self.world_size,
            is_master=False,
            timeout=dt.timedelta(seconds=_STORE_S),
            wait_for_workers=False,
        )
        return PrefixStore(f"{_PREFIX}/group-{self.name}", store)


_group: _Group | None = None
_PREFIX = "dptrain"


# The agent of torchrun keeps its store over all attempts, and counts its restarts for itself: two agents that meet
# again after one of them was started anew have different counts, and a change of membership raises none. So the keys
# of earlier attempts look like those of this one to every variable of the environment. Instead each replica
# leaves a random token; rank 0 names a group and invites the tokens that it finds; the group is on when all of them
# have accepted, which no dead replica does. A token that belonged to a group before is never invited again.


def _agree_on_group(store: Store, *, rank: int, world_size: int, deadline_s: float) -> str:
    """Return the name of a group that all replicas of this attempt, and no other, have agreed on.

    Raises:
        TimeoutError: where some did not come before the deadline.
        RendezvousError: where another process has taken this one's rank.
    """
    token = secrets.token_hex(8)
    store.set(f"came/{rank}", f"{world_size} {token}")
    if rank == 0:
        return _invite(store, token=token, world_size=world_size, deadline_s=deadline_s)
    return _accept(store, token=token, deadline_s=deadline_s)


def _invite(store: Store, *, token: str, world_size: int, deadline_s: float) -> str:
    """Name groups, as rank 0, until one is accepted by all of its members."""
    invited: list[str] = []
    name, poll_s = "", 0.005
    while True:
        tokens = _tokens(store, world_size=world_size)
        if tokens and tokens[0] != token:
            raise RendezvousError("another process came as rank 0 of this run: one rank cannot be started twice")
        if tokens and tokens != invited:
            before, name, invited = name, secrets.token_hex(8), tokens
            for other in tokens:
                store.set(f"invited/{other}", name)
            if before:
                store.set(f"on/{before}", "no")
            store.add(f"accepted/{name}", 1)
            poll_s = 0.005
        if name and store.add(f"accepted/{name}", 0) == world_size:
            store.set("used", " ".join(invited))
            store.set(f"on/{name}", "yes")
            return name
        if time.monotonic() > deadline_s:
            raise TimeoutError
        time.sleep(poll_s)
        poll_s = min(1.5 * poll_s, _LONGEST_POLL_S)


def _accept(store: Store, *, token: str, deadline_s: float) -> str:
    """Accept each group that this replica is invited to, until one is on."""
    accepted, poll_s = "", 0.005
    while True:
        try:
            if accepted and store.check([f"on/{accepted}"]) and store.get(f"on/{accepted}") == b"yes":
                return accepted
            if store.check([f"invited/{token}"]):
                invitation = store.get(f"invited/{token}").decode()
                if invitation != accepted:
                    accepted, poll_s = invitation, 0.005
                    store.add(f"accepted/{accepted}", 1)
        except RuntimeError:
            raise RendezvousError(
                "the store at which the replicas meet is gone, and with it rank 0 or its host: check its log"
            ) from None
        if time.monotonic() > deadline_s:
            raise TimeoutError
        # Not `Store.wait`: torch prints two lines for each that ends without its key.
        time.sleep(poll_s)
        poll_s = min(1.5 * poll_s, _LONGEST_POLL_S)


def _tokens(store: Store, *, world_size: int) -> list[str]:
    """Return the tokens of all ranks; empty where one is missing, of a group before, or of another world size."""
    keys = [f"came/{rank}" for rank in range(world_size)]
    if not store.check(keys):
        return []
    found = [value.decode().split() for value in store.multi_get(keys)]
    used = set(store.get("used").decode().split()) if store.check(["used"]) else set()
    if any(size != str(world_size) or token in used for size, token in found):
        return []
    return [token for _, token in found]


def _missing(store: Store, *, rank: int, world_size: int) -> str:
    """Name the ranks that have not come to this attempt."""
    try:
        used = set(store.get("used").decode().split()) if store.check(["used"]) else set()
        missing = [
            other
            for other in range(world_size)
            if not store.check([f"came/{other}"]) or store.get(f"came/{other}").decode().split()[1] in used
        ]
    except RuntimeError:  # the store is gone, and with it rank 0
        missing = [0]
    return _names(missing or [0 if rank else 1])


def _open_store(*, rank: int, world_size: int, timeout_s: float) -> Store:
    path = os.environ.get("DPTRAIN_STORE")
    if path:
        return PrefixStore(_PREFIX, FileStore(path, world_size))
    return _tcp_store(rank=rank, world_size=world_size, timeout_s=timeout_s)


def _tcp_store(*, rank: int, world_size: int, timeout_s: float) -> Store:
    """Open the store as torch's `env://` does, but without a wait for the others, which could not name them."""
    address, port = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", default=0)
    if not address or not port:
        raise RendezvousError(
            f"RANK and WORLD_SIZE are set, but not MASTER_ADDR and MASTER_PORT, where replicas meet"
            f"{_if_left_over(world_size)}"
        )
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not of_agent,
            timeout=dt.timedelta(seconds=timeout_s),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise RendezvousError(
                f"port {port}, where the replicas are to meet, is in use: set MASTER_PORT to a free one"
            ) from None
        raise RendezvousError(
            f"replica {rank} of {world_size} could not reach rank 0 at {address}:{port} within {timeout_s:g} s: see "
            f"whether it was started and whether that address is right{_if_left_over(world_size)}"
        ) from None
    return PrefixStore(_PREFIX, store)


def _backend(device: str, *, share_devices: bool) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    return "cpu:gloo,cuda:gloo" if share_devices else "cpu:gloo,cuda:nccl"  # with NCCL: not run on a GPU


def _connect(store: Store, *, name: str, backend: str, rank: int, world_size: int, timeout_s: float) -> None:
    try:
        dist.init_process_group(
            backend,
            # A name of its own for each attempt: in a store that outlives one, gloo would find dead addresses.
            store=PrefixStore(f"group-{name}", store),
            rank=rank,
            world_size=world_size,
            timeout=dt.timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        interface = os.environ.get("GLOO_SOCKET_IFNAME")
        hint = f"; GLOO_SOCKET_IFNAME is {interface!r}: is that a network interface of this machine?"
        raise RendezvousError(
            f"met the other replicas, but cannot connect to them: {_reason(error)}{hint if interface else ''}"
        ) from error
    global _group  # noqa: PLW0603 - one process has one group, as in torch.distributed
    _group = _Group(name=name, world_size=world_size)


def _place() -> tuple[int, int]:
    rank, world_size = _number("RANK", default=-1), _number("WORLD_SIZE", default=-1)
    if not 0 <= rank < world_size:
        raise RendezvousError(
            f"RANK={os.environ.get('RANK')} and WORLD_SIZE={os.environ.get('WORLD_SIZE')} do not go together"
            f"{_if_left_over(world_size)}"
        )
    return rank, world_size


def _number(name: str, *, default: int) -> int:
    text = os.environ.get(name)
    if text is not None and not re.fullmatch("[0-9]{1,9}", text):
        raise RendezvousError(f"{name}={text} in the environment is not a number{_if_left_over(0)}")
    return default if text is None else int(text)


def _seconds(name: str, *, default: float) -> float:
    text = os.environ.get(name)
    try:
        seconds = default if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= dt.timedelta.max.total_seconds():
        raise ConfigError(f"{name}={text} in the environment must be a number of seconds above 0")
    return seconds


def _names(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:_MAX_NAMED]))
    more = f" and {len(ranks) - _MAX_NAMED} more" if len(ranks) > _MAX_NAMED else ""
    return f"rank{'' if len(ranks) == 1 else 's'} {named}{more}"


def _if_left_over(world_size: int) -> str:
    """Return the remedy for who has used no launcher at all: a launcher's variables make any process a replica."""
    if "DPTRAIN_STORE" in os.environ or is_under_torchrun():
        return ""
    where = f" of {world_size}" if world_size > 0 else ""
    return (
        f"; if no launcher has started this process as a replica{where}, the variables are left over from one: "
        "`unset RANK WORLD_SIZE`"
    )


def is_under_torchrun() -> bool:
    """Whether a live torchrun has started this process; its variables alone may be left over from an earlier one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    return launcher_process() is not None


def launcher_process() -> psutil.Process | None:
    """Return the process of the torchrun, or alike, that has started this one; None where there is none."""
    try:
        for ancestor in psutil.Process().parents()[:_NUM_ANCESTORS]:
            words = [Path(word).name for word in ancestor.cmdline()[:_NUM_WORDS]]
            if any(word in _LAUNCHERS for word in words):
                return ancestor
    except psutil.Error:
        return None
    return None


_LAUNCHERS = frozenset(
    {"torchrun", "dptrain.runtime.hosts.torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate"}
)
_NUM_WORDS = 8  # of a command line, before the program that it starts


def _reason(error: BaseException) -> str:
    """Return the first line of a message of torch, without the place in its sources."""
    return re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().splitlines()[0])
