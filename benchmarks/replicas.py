"""Runs a function on several gloo replicas of one machine, for benchmarks that look at processes from inside."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

_PRELOADED = ["torch", "torch._dynamo", "scipy.special", "sklearn.datasets", "dptrain"]
"""Imported once in the server: each replica would spend seconds on what DDP, an interval and the digits ask for."""

Json = Any
"""What JSON can carry: results come back through a file."""


def run_replicas(function: Callable[..., Json], *, world_size: int, args: tuple[Any, ...] = ()) -> Json:
    """Return function(rank, world_size, *args) of rank 0, run on all ranks inside a gloo group of one thread each.

    The replicas meet in a file and talk over the loopback. They are forked from a server that has torch loaded already.

    Args:
        function: importable, at the top level of a module.
        world_size: number of replicas.
        args: further arguments, the same for all ranks.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback, where a replica raised; the others end.
    """
    multiprocessing.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        # torch leaves it without types.
        start_processes(  # type: ignore[no-untyped-call]
            _replica, args=(function, world_size, folder, args), nprocs=world_size, start_method="forkserver"
        )
        return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def _replica(rank: int, function: Callable[..., Json], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    result = function(rank, world_size, *args)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()
