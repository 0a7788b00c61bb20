"""The random loops of one launch, run as one of its replicas: a row of counts for each loop."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from benchmarks.misuse.random_loops import CORRECT, MISUSES, Outcome, drawn, is_false_alarm, is_silent_wrong, run


def run_loops(rank: int, world_size: int, number: int) -> list[dict[str, Any]]:
    """Run the first `number` correct and misused loops that are for so many replicas."""
    if world_size == 1:  # a bare model must not find a process group
        dist.destroy_process_group()
    rows = []
    for seed in range(number):
        for misuse in (CORRECT, MISUSES[seed % len(MISUSES)]):
            loop = drawn(seed, misuse=misuse)
            if loop.in_ddp == (world_size > 1):
                rows.append(_row(misuse, run(loop, rank=rank, world_size=world_size)))
    if world_size == 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)  # the launcher ends it
    return rows


def _row(misuse: str, outcome: Outcome) -> dict[str, Any]:
    bad = is_false_alarm(outcome) if misuse == CORRECT else is_silent_wrong(outcome)
    return {
        "misuse": misuse,
        "num_loops": 1,
        "reported": int(bool(outcome.reported)),
        "measured": outcome.num_measured,
        "wrong": int(outcome.num_wrong > 0),
        "bad": int(bad),
    }
