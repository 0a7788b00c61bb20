"""The page of the benchmark of local parallelism, written from its JSON, so that the two are of one run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.local_parallelism.losses import CONTROL
from benchmarks.result_tables import figures_table, rows_table

_HOW_TRAINED = """Held-out nats per byte, mean ± standard deviation over the seeds, and GFLOP of a run: 6,400 samples.
The task is `gpt` on the text of `pysource`: windows of 32 bytes in batches of 32, width 64, depth 4. The difference is
seed by seed. All arms have the learning rate that the task suggests, 2e-3, where the command names no other. That is
low for 200 steps: in a [trial](../../docs/log.md) at twice the rate all arms end lower, and two local blocks nearer to
end to end. Noise scales are in samples, with 95 % intervals, one for each seed at the end of its run: of the whole the
present one, of blocks the mean over the window, which is resolved sooner."""

_HOW_TIMED = """Samples/s of local blocks over those of torch's `Schedule1F1B` on two processes: the median of
interleaved rounds of 4 steps, with its 95 % interval. `no bubbles` is what it would be with m micro-batches and stages
of equal time: 1 + 1/m, less one forward pass at the beginning of a round.

Where a pass takes the time of a device, each process sleeps for it (forward once, backward twice): schedules and
messages are real, products are not. Where it takes the core's own time, the first local block has a head more than the
first stage of 1F1B. `no core` is the share of the time in which a process could have run and other work had its core;
where it is not small, the ratio of seconds says little. `CPU time` is that of the busier process, local blocks over
1F1B, which other work hardly changes."""


def page(path: Path) -> str:
    """Return the page of a result."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows, environment = found["rows"], found["environment"]
    processor = f"{environment['processor']}, {environment['cpu_count']} cores"
    where = f"`{found['command']}` on {processor}, torch {environment['torch']}, gloo over loopback."
    parts = [
        "# What local parallelism costs in loss, and how much faster than 1F1B its stages are",
        where,
        *_losses([row for row in rows if row["part"] == "losses"]),
        *_throughput([row for row in rows if row["part"] == "throughput"]),
        figures_table(found["figures"]).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    control = next(row for row in rows if row["arm"] == CONTROL)
    cells = [
        {
            **row,
            "above": "–" if row is control else _difference(row["losses"], control["losses"]),
            "noise": ", ".join(map(_scale, row["noise_scale"])),
        }
        for row in rows
    ]
    columns = {
        "arm": "{arm}",
        "held-out loss": "{loss:.4f} ± {spread:.4f}",
        f"above {CONTROL}": "{above}",
        "GFLOP": "{gflop:.3g}",
        "noise scale": "{noise}",
    }
    of_blocks = [
        {"arm": row["arm"], "block": block, "noise": ", ".join(map(_scale, scales))}
        for row in rows
        for block, scales in row["noise_scale_of_blocks"].items()
    ]
    blocks = rows_table(of_blocks, {"arm": "{arm}", "block": "{block}", "noise scale by its own loss": "{noise}"})
    return ["## Loss at equal samples", _HOW_TRAINED, rows_table(cells, columns).rstrip(), blocks.rstrip()]


def _difference(own: Sequence[float], control: Sequence[float]) -> str:
    pairs = [a - b for a, b in zip(own, control, strict=True)]
    spread = statistics.stdev(pairs) if len(pairs) > 1 else 0.0
    return f"{statistics.mean(pairs):+.4f} ± {spread:.4f}"


def _scale(one: Sequence[float | None]) -> str:
    low, value, high = one
    if value is None:
        return "not resolved" if low is None else f"at least {low:.0f}"
    return f"{value:.0f} [{'–' if low is None else f'{low:.0f}'}, {'–' if high is None else f'{high:.0f}'}]"


def _throughput(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [
        {
            **row,
            "taken": f"{1000 * row['pass_s']:g} ms of a device" if row["pass_s"] else "the core's time",
            "interval": "{1:.3f} [{0:.3f}, {2:.3f}]".format(*row["ratio"]),
            "pipeline": row["samples_per_s"]["1F1B"],
            "local": row["samples_per_s"]["local blocks"],
            "cpu": "–" if row["pass_s"] else f"{row['cpu']:.2f}",
        }
        for row in rows
    ]
    columns = {
        "a pass takes": "{taken}",
        "m": "{micro_batches}",
        "rounds": "{rounds}",
        "ratio": "{interval}",
        "no bubbles": "{without_bubbles:.3f}",
        "1F1B, samples/s": "{pipeline:.0f}",
        "local, samples/s": "{local:.0f}",
        "no core": "{waited:.0%}",
        "CPU time": "{cpu}",
    }
    return ["## Throughput of two stages", _HOW_TIMED, rows_table(cells, columns).rstrip()]
