"""How long does each kind of exchange take to the same held-out loss, on networks from 10 Mbit/s to 1 Gbit/s?"""
# python -m benchmarks.exchange --parts networks: this is a part of that benchmark
#
# Steps to the target do not depend on the network, so they are searched for on the loopback: batches and rates of each
# kind. A network is then asked for the seconds of a step alone. A worker trains one job after the other with the
# trainer itself, in a process for each host, and notes time and sent bytes of each step.

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.hosts.delayed_network import delayed_network
from benchmarks.hosts.namespaces import Network, network
from dptrain.exchange import ExchangeConfig
from dptrain.tasks import Task, resolve_task
from dptrain.tasks.base import Moment, TrainHook
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, OptimizerConfig, TrainConfig, Trainer

TARGET = 0.2
"""Held-out cross-entropy of the wide MLP on digits, in nats."""
_PORT = 29511
WARM_UP = 4
"""Steps before the first that is timed: DDP lays out its buckets anew after one, and TCP opens its windows."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run.

    Attributes:
        name: of it, and of its files.
        exchange: settings that are not the default.
        batch: global batch, in samples; None for the default law from the task's batch on.
        rate: learning rate of AdamW, constant.
        num_samples: at most.
        seed: of initialisation and order.
        model: wide, or the task's own small one.
        evaluates: whether it ends at the target; else it takes all samples.
    """

    name: str
    exchange: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = 64
    rate: float = 1e-3
    num_samples: int = 20_000
    seed: int = 0
    model: str = "wide"
    evaluates: bool = True


class _Notes(TrainHook):
    """Notes time and sent bytes after each step, and ends a run at the target."""

    def __init__(self, *, evaluates: bool) -> None:
        self.steps: list[tuple[int, int, float, int, int]] = []
        self.reached: dict[str, float] | None = None
        self._evaluates = evaluates

    def on_step(self, moment: Moment) -> None:
        """Note a step."""
        self.steps.append((moment.step, moment.samples_seen, time.monotonic(), *sent()))

    def on_evaluation(self, moment: Moment, figures: Mapping[str, float]) -> bool:
        """End at the target."""
        if self._evaluates and self.reached is None and figures["loss"] <= TARGET:
            self.reached = {"samples": moment.samples_seen, "steps": moment.step, "at_s": time.monotonic()}
        return self.reached is not None


def sent() -> tuple[int, int]:
    """Return the bytes and the packets that this host has sent by its network; 0 and 0 without `eth0`."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8]), int(counters.split()[9])
    return 0, 0


def wide() -> Task:
    """Build digits with a model of 1,126,410 parameters: 4.5 MB of gradients for few operations."""
    task = resolve_task("digits", options={})
    layers = (nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    object.__setattr__(task, "model", nn.Sequential(*layers))
    return task


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Run a job on this replica; all replicas do so."""
    notes = _Notes(evaluates=job.evaluates)

    def build() -> Task:
        task = wide() if job.model == "wide" else resolve_task("digits", options={})
        object.__setattr__(task, "hook", notes)
        return task

    batch = job.batch or 32
    config = TrainConfig(
        run_dir=str(folder / job.name),
        seed=job.seed,
        max_samples=job.num_samples,
        global_batch_size=batch,
        micro_batch_size=max(batch // int(os.environ["WORLD_SIZE"]), 1),
        device="cpu",
        exchange=ExchangeConfig(**job.exchange),
        control=ControlConfig(law="constant", mode="off") if job.batch else ControlConfig(largest=1024),
        noise=NoiseConfig(),
        optimizer=OptimizerConfig(learning_rate=job.rate, schedule="constant", warmup_samples=0),
        checkpoint=CheckpointConfig(every_samples=10**9),
        log=LogConfig(tracker="none", eval_every_samples=256 if job.evaluates else 10**9, print_every_steps=10**6),
    )
    trainer = Trainer(config, task=build)
    began_s = time.monotonic()
    trainer.run()
    summary = json.loads((folder / job.name / "summary.json").read_text()) if trainer.is_main else {}
    return {
        "steps": notes.steps,
        "reached": notes.reached,
        "seconds": None if notes.reached is None else notes.reached["at_s"] - began_s,
        "bytes_per_step": summary.get("bytes_per_step"),
        "eval_loss": summary.get("eval_loss"),
    }


def run_jobs(
    jobs: Sequence[Job], folder: Path, *, net: Network | None = None, timeout_s: float = 900
) -> dict[str, Any]:
    """Run jobs on the hosts of a network, or on two processes of this machine; return their results by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
    module = "benchmarks.exchanges.slow_networks"
    started = start_on(net, module, folder) if net else _start_here(module, folder)
    try:
        codes = [process.wait(timeout=timeout_s) for process in started]
    finally:
        for process in started:
            process.kill()
    if any(codes):
        log = net.hosts[0].log if net else folder / "host-0.log"
        raise SystemExit(f"the worker failed: {log.read_text()[-2000:]}")
    return {job.name: json.loads((folder / f"result-{job.name}.json").read_text()) for job in jobs}


def start_on(net: Network, module: str, argument: Path) -> list[subprocess.Popen[bytes]]:
    """Start a module on each host, one replica each."""
    number, address = len(net.hosts), net.hosts[0].address
    command = (sys.executable, "-m", module, argument)
    return [
        host.command(*command, **_place(rank, number=number, address=address)) for rank, host in enumerate(net.hosts)
    ]


def _start_here(module: str, folder: Path) -> list[subprocess.Popen[bytes]]:
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **_place(rank, number=2, address="127.0.0.1")},
            stdout=(folder / f"host-{rank}.log").open("a"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]


def _place(rank: int, *, number: int, address: str) -> dict[str, str]:
    whole = {"RANK": rank, "WORLD_SIZE": number, "MASTER_ADDR": address, "MASTER_PORT": _PORT}
    return {name: str(value) for name, value in {**whole, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items()}


def made_network(folder: Path, *, delay_s: float, number: int = 2) -> AbstractContextManager[Network]:
    """Give hosts, with a delay or without."""
    return delayed_network(folder, number, delay_s=delay_s) if delay_s else network(folder, number)


def per_step(result: Mapping[str, Any], *, every: int = 1) -> tuple[float, float, float]:
    """Return seconds, sent bytes and sent packets of a step, over whole rounds of `every` steps past the warm-up.

    From the middle of a round to that of another one: there no parameters are on their way.
    """
    steps = result["steps"]
    first = -(-WARM_UP // every) * every + every // 2
    last = first + (len(steps) - first) // every * every
    (number, _, *before), (end, _, *after) = steps[first - 1], steps[last - 1]
    seconds, num_bytes, packets = ((b - a) / (end - number) for a, b in zip(before, after, strict=True))
    return seconds, num_bytes, packets


RATES = (5e-4, 2e-3)
_CONFIGURED: Mapping[str, tuple[Mapping[str, Any], tuple[int, ...]]] = {
    "all_reduce": ({}, (32, 128, 512)),
    "int8": ({"kind": "compressed", "codec": "int8"}, (128, 512)),
    "powersgd": ({"kind": "compressed", "codec": "powersgd"}, (128, 512)),
    "local 8": ({"kind": "local_updates", "every": 8}, (32, 128, 512)),
    "local 32": ({"kind": "local_updates", "every": 32}, (32, 128)),
}
"""Kinds, their settings, and the global batches that are tried."""
NETWORKS = ((100, 0.05), (10, 0.05), (100, 0.0), (1000, 0.0), (10, 0.0), (1000, 0.05))
"""Bandwidth in Mbit/s, and delay in seconds one way."""


def search(folder: Path, *, seeds: int, quick: bool) -> list[dict[str, Any]]:
    """Return for each kind and batch the best rate, and the steps to the target of each seed; None where missed."""
    arms = [
        (name, settings, batch)
        for name, (settings, batches) in _CONFIGURED.items()
        for batch in (batches[-1:] if quick else batches)
        if not quick or name in ("all_reduce", "local 8")
    ]
    tried = [
        Job(name=f"{name} {batch} {rate} 0".replace(" ", "_"), exchange=settings, batch=batch, rate=rate)
        for name, settings, batch in arms
        for rate in (RATES[1:] if quick else RATES)
    ]
    found = run_jobs(tried, folder / "search", timeout_s=3000)
    rows: list[dict[str, Any]] = []
    more: list[tuple[dict[str, Any], Job]] = []
    for name, settings, batch in arms:
        own = [job for job in tried if job.exchange == settings and job.batch == batch]
        best = min(own, key=lambda job: _steps(found[job.name]) or 10**9)
        rows.append({"kind": name, "batch": batch, "rate": best.rate, "steps": [_steps(found[best.name])]})
        more += [
            (rows[-1], Job(**{**asdict(best), "name": f"{best.name[:-1]}{seed}", "seed": seed}))
            for seed in range(1, seeds)
            if rows[-1]["steps"][0] is not None
        ]
    again = run_jobs([job for _, job in more], folder / "seeds", timeout_s=3000) if more else {}
    for row, job in more:
        row["steps"].append(_steps(again[job.name]))
    return rows


def _steps(result: Mapping[str, Any]) -> int | None:
    return None if result["reached"] is None else int(result["reached"]["steps"])


def timed(rows: Sequence[Mapping[str, Any]], folder: Path, *, mbit: int, delay_s: float) -> list[dict[str, Any]]:
    """Return seconds and bytes of a step of each row on a network, and of an ensemble, whose replicas only agree."""
    jobs, rounds = [], {}
    for row in [*rows, {"kind": "ensemble", "batch": 32, "rate": 1e-3}]:
        settings = {"kind": "ensemble"} if row["kind"] == "ensemble" else _CONFIGURED[row["kind"]][0]
        name = f"{row['kind']}-{row['batch']}".replace(" ", ".")
        rounds[name] = every = int(settings.get("every", 1))
        steps = WARM_UP + 6 if every == 1 else 2 * every + every // 2 + 2
        jobs.append(
            Job(
                name=name,
                exchange=settings,
                batch=row["batch"],
                rate=row["rate"],
                num_samples=steps * row["batch"],
                evaluates=False,
            )
        )
    with made_network(folder, delay_s=delay_s) as net:
        for host in net.hosts:
            host.shape(f"{mbit}mbit", queue="400ms")
        found = run_jobs(jobs, folder / "timed", net=net, timeout_s=1500)
    measured = []
    agreement = per_step(found[jobs[-1].name])[1]
    for job in jobs:
        seconds, wire, _ = per_step(found[job.name], every=rounds[job.name])
        said = found[job.name]["bytes_per_step"]
        row = {"mbit": mbit, "delay_s": delay_s, "batch": job.batch, "step_s": seconds, "sent": wire, "said": said}
        kind = job.name.rpartition("-")[0].replace(".", " ")
        measured.append({"kind": kind, "every": rounds[job.name], **row, "agreement": agreement})
    return measured


def _work(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, number = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    master = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=master, rank=rank, world_size=number)
    dist.barrier()
    for raw in json.loads((folder / "jobs.json").read_text()):
        job = Job(**raw)
        found = train(job, folder)
        if rank == 0:
            (folder / f"result-{job.name}.json").write_text(json.dumps(found))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
