"""What local losses cost: a GPT trained end to end and in local blocks at equal samples; each block's noise scale."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.learners.runs import run
from benchmarks.learners.ways import source_tokens
from dptrain.train import NoiseConfig, OptimizerConfig

DEPTH = 4
SEEDS = (0, 1, 2)
CONTROL = "end to end"
ARMS: Mapping[str, Mapping[str, int]] = {
    CONTROL: {},
    "2 local blocks": {"local_blocks": 2},
    "4 local blocks": {"local_blocks": 4},
    # What the first of two local blocks is by itself: what the second adds to it shows in the difference.
    "end to end, half as deep": {"depth": DEPTH // 2},
}


def losses(folder: Path, *, quick: bool, rate: float | None = None, num_processes: int = 2) -> list[dict[str, Any]]:
    """Return a row for each arm, runs of a seed side by side.

    Args:
        folder: for what runs write.
        quick: shorter runs of one seed.
        rate: learning rate of all arms; None for the one that the task suggests.
        num_processes: runs at a time, of one thread each; what they learn does not depend on it.
    """
    data = source_tokens(folder / "data")
    jobs = [(name, seed) for seed in SEEDS[: 1 if quick else None] for name in ARMS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        num_processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [
            pool.submit(
                run,
                _settings(data, ARMS[name], quick=quick, rate=rate),
                seed=seed,
                folder=folder / f"{name.replace(',', '')} {seed}",
            )
            for name, seed in jobs
        ]
        summaries = []
        for (name, seed), future in zip(jobs, futures, strict=True):
            summaries.append(future.result())
            print(f"{name}, seed {seed}: {summaries[-1]['eval_loss']:.4f}", file=sys.stderr)
    return [_row(name, summaries[place :: len(ARMS)]) for place, name in enumerate(ARMS)]


def _settings(data: Path, options: Mapping[str, int], *, quick: bool, rate: float | None) -> dict[str, Any]:
    shape = {"vocab_size": 256, "context": 32, "width": 64, "depth": DEPTH, **options}
    return {
        "task": "gpt",
        "task_options": {"data": str(data), **shape},
        "max_samples": 640 if quick else 6_400,
        "global_batch_size": 32,
        "micro_batch_size": 16,
        "optimizer": OptimizerConfig(learning_rate=rate),
        "noise": NoiseConfig(every=2, groups="local_blocks" if "local_blocks" in options else False),
    }


def _row(name: str, summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [summary["eval_loss"] for summary in summaries]
    first = "noise_scale/local_blocks."
    blocks = [key.split("/")[1] for key in summaries[0] if key.startswith(first) and key.endswith("/value")]
    of_whole = ("noise_scale_lower", "noise_scale", "noise_scale_upper")
    return {
        "part": "losses",
        "arm": name,
        "losses": own,
        "loss": statistics.mean(own),
        "spread": statistics.stdev(own) if len(own) > 1 else 0.0,
        "gflop": summaries[0]["flops"] / 1e9,
        "noise_scale": [[summary[key] for key in of_whole] for summary in summaries],
        "noise_scale_of_blocks": {
            block: [
                [summary[f"noise_scale/{block}/{key}"] for key in ("lower", "value", "upper")] for summary in summaries
            ]
            for block in blocks
        },
    }
