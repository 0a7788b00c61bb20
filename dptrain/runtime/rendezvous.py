"""How replicas find one another: who is missing is named after two minutes instead of half an hour; trains nothing."""

from __future__ import annotations

import datetime as dt
import logging
import os
import re

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # not in __all__

from dptrain.errors import ConfigError, RendezvousError

_JOIN_TIMEOUT_S = 120.0
_COLLECTIVE_TIMEOUT_S = 300.0  # a replica that hangs must not hold the others for torch's half hour
_MAX_NAMED = 8

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
    path = os.environ.get("DPTRAIN_STORE")
    store = FileStore(path, world_size) if path else _tcp_store(rank=rank, world_size=world_size, timeout_s=join_s)
    _wait_for_all(store, rank=rank, world_size=world_size, timeout_s=join_s)
    backend = _backend(device, share_devices=share_devices)
    _connect(store, backend=backend, rank=rank, world_size=world_size, timeout_s=collective_s)
    if rank == 0 and world_size > _number("LOCAL_WORLD_SIZE", default=world_size):
        _log.warning(
            "the replicas of several nodes talk without encryption or password: let them do so only on a network "
            "that you trust"
        )


def _wait_for_all(store: Store, *, rank: int, world_size: int, timeout_s: float) -> None:
    """Wait until each replica has come; costs each of them four words with the store, however many they are."""
    store.set(f"came/{rank}", "")
    if store.add("number", 1) == world_size:
        store.set("all", "")
    try:
        store.wait(["all"], dt.timedelta(seconds=timeout_s))
    except RuntimeError:
        try:
            missing = [other for other in range(world_size) if not store.check([f"came/{other}"])]
        except RuntimeError:  # the store is gone, and with it rank 0
            missing = [0]
        raise RendezvousError(
            f"waited {timeout_s:g} s for {_names(missing)} of {world_size}, in vain: see whether it was started and "
            f"what it says{_if_left_over(world_size)}"
        ) from None


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
    # The agent's store outlives an attempt of the replicas.
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _backend(device: str, *, share_devices: bool) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return "gloo"
    return "cpu:gloo,cuda:gloo" if share_devices else "cpu:gloo,cuda:nccl"  # with NCCL: not run on a GPU


def _connect(store: Store, *, backend: str, rank: int, world_size: int, timeout_s: float) -> None:
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
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
    if "DPTRAIN_STORE" in os.environ:
        return ""
    where = f" of {world_size}" if world_size > 0 else ""
    return (
        f"; if no launcher has started this process as a replica{where}, the variables are left over from one: "
        "`unset RANK WORLD_SIZE`"
    )


def _reason(error: BaseException) -> str:
    """Return the first line of a message of torch, without the place in its sources."""
    return re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().splitlines()[0])
