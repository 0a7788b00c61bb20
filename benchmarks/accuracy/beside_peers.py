"""What other packages make of the gradients of a known problem, for information; the meters are judged in `cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import dptrain
from benchmarks.accuracy.problems import Mixture, Problem, digits_with_replacement, linear
from benchmarks.accuracy.repetitions import Form, plain_row
from benchmarks.accuracy.wrappers import Method
from benchmarks.overhead.peers import PEERS, Finish
from dptrain.tasks import KnownAnswer

SHARDS = {"2×1": (32, 32), "8/56": (8, 56)}
"""Samples of each of two replicas, whose mean gradients DDP averages with equal weights."""
OURS: dict[str, Method] = {"parameters": "parameters", "hook": "hook"}
NUM_COPIES = 20
NUM_STEPS = 400

_Read = Callable[[], tuple[float, float]]


def measure_peers(rank: int, world_size: int, form: Form) -> list[dict[str, Any]]:
    """Measure with each peer, and with ours, on the same gradients of two replicas in DDP; rank 0 returns the rows."""
    rows = []
    for make_problem in (linear, digits_with_replacement):
        problem = make_problem()
        for layout, shards in SHARDS.items():
            for name in (*OURS, *PEERS):
                try:
                    grad, trace = _estimate(name, problem, shards=shards, rank=rank, form=form)
                except ImportError:
                    continue  # nothing can be said of a package that is not installed
                if name in PEERS:
                    trace *= sum(shards) / world_size  # they get no sizes, and count in small batches
                rows.append(
                    plain_row(
                        problem=problem.name,
                        wrapper="DDP",
                        layout=layout,
                        observer=f"peer {name}" if name in PEERS else name,
                        truth=KnownAnswer(
                            noise_trace=NUM_COPIES * problem.truth.noise_trace,
                            grad_sq_norm=NUM_COPIES * problem.truth.grad_sq_norm,
                        ),
                        found=KnownAnswer(noise_trace=trace, grad_sq_norm=grad),
                    )
                )
    return rows if rank == 0 else []


def _estimate(name: str, problem: Problem, *, shards: tuple[int, ...], rank: int, form: Form) -> tuple[float, float]:
    """Return |G|² and tr(Σ) as one observer sees the sum over all copies; the parameters stay where they are."""
    model = DistributedDataParallel(Mixture([problem], num_copies=NUM_COPIES))
    finish, read = _observer(name, model, torch.optim.SGD(model.parameters(), lr=0.0))
    generator = torch.Generator().manual_seed(11)
    begin = sum(shards[:rank])
    for _ in range(NUM_STEPS // form.shortening**2):
        samples = problem.draw(generator, (NUM_COPIES, sum(shards))).transpose(0, 1)
        model(samples[begin : begin + shards[rank]]).mean().backward()
        finish()
    return read()


def _observer(name: str, model: DistributedDataParallel, optimizer: Optimizer) -> tuple[Finish, _Read]:
    if name in PEERS:
        peer = PEERS[name](model, optimizer)
        return peer.finish, peer.estimate
    meter = dptrain.attach(model, every=1, method=OURS[name])

    def finish() -> None:
        meter.step()
        optimizer.zero_grad()

    def read() -> tuple[float, float]:
        scale = meter.read()
        return scale.grad_sq_norm, scale.noise_trace

    return finish, read
