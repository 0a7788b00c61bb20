"""Where a rank stands among the others, and the processes of one host that the doctor starts by itself."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from dptrain.errors import ConfigError

_SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KILL_AFTER_S = 10.0  # beyond its own limit a rank that hangs is beyond help


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank and where it meets the others.

    Attributes:
        rank, world_size: among all ranks.
        local_rank, local_world_size: among those of its host.
        address, port: where rank 0 serves the store.
        has_agent_store: whether torchrun serves it instead.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    has_agent_store: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the place that a launcher gave this process, or None where there was no launcher.

        Raises:
            ConfigError: where a variable is missing or no number.
        """
        given = [name for name in _SET_BY_LAUNCHERS if environment.get(name)]
        if not {"RANK", "WORLD_SIZE"} & set(given):
            return None
        if missing := [name for name in _SET_BY_LAUNCHERS if name not in given]:
            raise ConfigError(
                f"{', '.join(given)} set, but not {', '.join(missing)}: start the ranks by one launcher, or unset them"
            )
        world_size = _number(environment, "WORLD_SIZE")
        return cls(
            rank=_number(environment, "RANK"),
            world_size=world_size,
            local_rank=_number(environment, "LOCAL_RANK", default=0),
            local_world_size=_number(environment, "LOCAL_WORLD_SIZE", default=1),
            address=environment["MASTER_ADDR"],
            port=_number(environment, "MASTER_PORT"),
            has_agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def places_of_host(*, num_nodes: int, node_rank: int, address: str, port: int, num_ranks: int) -> list[Place]:
    """Return the places of one host's ranks, where each of `num_nodes` hosts has `num_ranks`.

    Raises:
        ConfigError: where the numbers do not go together.
    """
    if num_nodes < 1 or num_ranks < 1 or not 0 <= node_rank < num_nodes:
        raise ConfigError(
            f"there must be at least one node with one rank, and a node rank below the number of nodes, got "
            f"nnodes {num_nodes}, node_rank {node_rank} and nproc {num_ranks}"
        )
    if num_nodes > 1 and not address:
        raise ConfigError(f"{num_nodes} nodes meet at the first of them: give its name or address with --head")
    return [
        Place(
            rank=node_rank * num_ranks + local_rank,
            world_size=num_nodes * num_ranks,
            local_rank=local_rank,
            local_world_size=num_ranks,
            address=address or "127.0.0.1",
            port=port,
        )
        for local_rank in range(num_ranks)
    ]


def run_ranks(places: Sequence[Place], examine_one: Callable[[Place], int], *, limit_s: float) -> int:
    """Run `examine_one` in a process for each place, and return the largest exit code.

    The processes are copies of this one, which has loaded torch; that saves 2 s and more for each. Threads are set as
    the launcher of training sets them: the cores of the host over its ranks.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_become_rank, args=(place, examine_one)) for place in places]
    for process in processes:
        process.start()
    deadline_s = time.monotonic() + limit_s + _KILL_AFTER_S
    for process in processes:
        process.join(max(0.1, deadline_s - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    if late:
        sys.stderr.write(f"dptrain doctor: {len(late)} ranks did not end within {limit_s + _KILL_AFTER_S:g} s\n")
    return max(128 - code if code < 0 else code for code in (process.exitcode or 0 for process in processes))


def _become_rank(place: Place, examine_one: Callable[[Place], int]) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, cores // place.local_world_size))
    code = examine_one(place)
    sys.stdout.flush()
    os._exit(code)  # torch's teardown in a copy is nothing to wait for


def _number(environment: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    text = environment.get(name)
    if not text and default is not None:
        return default
    if not text or not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"{name}={text} in the environment is not a number")
    return int(text)
