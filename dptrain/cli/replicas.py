"""Starts the replicas of one node: a thin shell over torchrun; what a replica does is not known here."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence

from dptrain.errors import ConfigError


def is_replica(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_silent_replica(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a replica whose errors another one most likely tells already."""
    return is_replica(environment) and environment["RANK"] != "0"


def default_replicas(*, cpu: bool) -> int:
    """Return the number of GPUs, or two where there is none: the least that has gradients to compare."""
    import torch

    num_gpus = 0 if cpu else torch.cuda.device_count()
    return num_gpus or 2


def start_replicas(arguments: Sequence[str], *, num_replicas: int) -> int:
    """Run `python -m dptrain ARGUMENTS` as `num_replicas` processes and wait for them.

    Returns:
        0, or the exit code of the replica that failed first.

    Raises:
        ConfigError: for a number below 1.
    """
    if num_replicas < 1:
        raise ConfigError(f"--replicas must be at least 1, got {num_replicas}")
    # A restarted replica would read the dead attempt's addresses in the shared store (pytorch#135712).
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_replicas)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _silence_agent()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_replicas,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "dptrain", *arguments)
    except ChildFailedError as error:
        return _exit_code(error)
    except SignalException:
        # The replicas were asked to stop and have stopped; each has said how far it came.
        from dptrain.train.preemption import EXIT_RESUMABLE

        return EXIT_RESUMABLE
    return 0


def _silence_agent() -> None:
    """What failed, or stopped, is said by the replicas themselves; the agent's messages would bury it."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each has a level of its own
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _exit_code(error: object) -> int:
    _, failure = error.get_first_failure()  # type: ignore[attr-defined]
    code = int(failure.exitcode)
    return code if code > 0 else 128 - code
