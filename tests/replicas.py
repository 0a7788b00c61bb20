"""Runs a function on several real gloo replicas, in processes forked from a server that has torch loaded already."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
# What DDP and an interval import takes a replica 3 s of CPU time, and most tests start several.
_context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "torch._dynamo",
        "torch.distributed.tensor",
        "scipy.special",
        "dptrain",
        "dptrain.train",
    ]
)


def run_replicas(function, *, world_size, args=(), timeout_s=280.0):
    """Return [function(rank, world_size, *args) for each rank], each in a process of its own with a gloo group.

    The environment is that of torchrun, so that accelerate finds its place. `function` must be importable (top level
    of a test module). Raises the first replica's traceback as an AssertionError; kills only its own processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(world_size)]
        processes = [
            _context.Process(
                target=_replica, args=(function, rank, world_size, folder, pipes[rank][1], args), daemon=False
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        try:
            return _collect(processes, [receiver for receiver, _ in pipes], deadline=time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(processes, receivers, *, deadline):
    results = {}
    while len(results) < len(processes):
        for rank, (process, receiver) in enumerate(zip(processes, receivers, strict=True)):
            if rank in results:
                continue
            if receiver.poll(0.01):
                try:
                    ok, value = receiver.recv()
                except EOFError:
                    process.join()
                    raise AssertionError(f"replica {rank} died with exit code {process.exitcode}") from None
                assert ok, f"replica {rank} raised:\n{value}"
                results[rank] = value
        assert time.monotonic() < deadline, f"replicas {sorted(set(range(len(processes))) - set(results))} hang"
    return [results[rank] for rank in range(len(processes))]


def _replica(function, rank, world_size, folder, sender, args):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",
        OMP_NUM_THREADS="1",
    )
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=world_size
        )
        # Who is done before another has made its connections would tear them.
        dist.barrier()
        sender.send((True, function(rank, world_size, *args)))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent must hear of it
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
