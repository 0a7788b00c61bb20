"""From the seconds of rounds to throughput of local blocks over that of 1F1B, with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.local_parallelism.stages import MICRO_BATCH


def throughput_rows(rounds: Sequence[Mapping[str, Any]], *, steps: int, pass_s: float) -> list[dict[str, Any]]:
    """Return a row for each number of micro-batches.

    Args:
        rounds: of both ways, as `stages.timed` returns them.
        steps: in a round.
        pass_s: seconds of a stage's forward pass on its device.
    """
    rows = []
    for count in sorted({one["micro_batches"] for one in rounds}):
        seconds = {
            way: [one["seconds"] for one in rounds if (one["way"], one["micro_batches"]) == (way, count)]
            for way in ("1F1B", "local blocks")
        }
        busy = {
            way: [one["cpu_s"] for one in rounds if (one["way"], one["micro_batches"]) == (way, count)]
            for way in seconds
        }
        samples = steps * count * MICRO_BATCH
        rows.append(
            {
                "part": "throughput",
                "pass_s": pass_s,
                "micro_batches": count,
                # Paired: the two of a round ran one after the other, under the same load.
                "ratio": median_interval([a / b for a, b in zip(*seconds.values(), strict=True)]),
                # The second process waits for a forward pass, a third of the time of a micro-batch, once in a round.
                "without_bubbles": steps * (count + 1) / (steps * count + 1 / 3),
                "samples_per_s": {way: samples / statistics.median(own) for way, own in seconds.items()},
                "cpu": statistics.median(
                    [a / b for a, b in zip(busy["local blocks"], busy["1F1B"], strict=True)],
                ),
                "waited": statistics.median(one["waited"] for one in rounds if one["micro_batches"] == count),
                "rounds": len(seconds["1F1B"]),
            }
        )
    return rows


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 95 % interval of the median and the median between its ends, by resampling."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), size=(10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(np.median(values)), float(high)
