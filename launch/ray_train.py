"""Run on a Ray cluster: Ray Train places one worker per replica, and each worker is a replica of `dptrain train`.

Who runs it: a user of the cluster, with dptrain installed on all its nodes:
    python launch/ray_train.py --num-workers 8 --gpu --run-dir /shared/run --config /shared/run.yaml
What to change: the options below; all others go to `dptrain train` unchanged. The run folder is on shared storage.
What was run for real: Ray 2.60 on one machine with two CPU workers, a run to its end. Not run: a worker that is killed
(tests/launch/test_ray.py is written for it), GPUs, several nodes.

Each worker starts a process of its own: Ray runs a worker's function on a thread, where Python lets nobody handle
signals, and a replica has to save on SIGTERM.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

GRACE_S = 60.0  # of a replica that is asked to stop: the step under way, and a checkpoint
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def replica(settings: dict[str, Any]) -> None:
    """Be one replica: start `dptrain train` as a process that meets the others where rank 0 says."""
    context = ray.train.get_context()
    # Ray's own group serves to agree on a port and on whether there is something to resume; the replicas make another.
    meeting: list[Any] = [None]
    if context.get_world_rank() == 0:
        resume = settings["resume"] or (Path(settings["run_dir"]) / "config.yaml").exists()
        meeting = [(ray.util.get_node_ip_address(), free_port(), resume)]
    dist.broadcast_object_list(meeting)
    address, port, resume = meeting[0]
    environment = {
        **os.environ,
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, "-m", "dptrain", "train", *settings["arguments"], "--run-dir", settings["run_dir"]]
    process = subprocess.Popen(
        [*command, "--resume"] if resume else command,
        env=environment,
        preexec_fn=end_with_worker,  # noqa: PLW1509 - it takes no lock
    )
    try:
        code = process.wait()
    finally:  # Ray ends the worker: the replica saves and goes too
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
    if code:
        raise RuntimeError(f"rank {context.get_world_rank()} of dptrain ended with exit code {code}; its log says why")


def end_with_worker() -> None:
    """Ask the kernel to stop this process when its Ray worker is gone; an orphan would train on. Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))


def free_port() -> int:
    """Return a port of this node that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Read the options, refuse a folder that holds a run unless it is to be resumed, and train."""
    parser = argparse.ArgumentParser(description="dptrain train on a Ray cluster", allow_abbrev=False)
    parser.add_argument("--num-workers", type=int, default=2, help="replicas (2)")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each replica")
    parser.add_argument("--max-failures", type=int, default=3, help="restarts by Ray after a failure (3)")
    parser.add_argument("--run-dir", required=True, help="run folder, on storage that all nodes share")
    parser.add_argument("--resume", action="store_true", help="go on with the run in run_dir")
    options, arguments = parser.parse_known_args()
    run_dir = Path(options.run_dir).resolve()
    if (run_dir / "config.yaml").exists() and not options.resume:
        parser.error(f"{run_dir} holds a run: add --resume to go on with it, or choose another folder")
    trainer = TorchTrainer(
        replica,
        train_loop_config={"arguments": arguments, "run_dir": str(run_dir), "resume": options.resume},
        scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=options.gpu),
        # What Ray itself keeps lies beside the run folder; the checkpoints are dptrain's own.
        run_config=RunConfig(
            name="ray",
            storage_path=str(run_dir.parent / f".{run_dir.name}-ray"),
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
