"""Does a run on three hosts end the same, and end truly, whatever happens to the hosts on the way?"""
# python -m benchmarks.hosts [--events N] [--minutes M] [--seed S] [--json PATH|-] [--quick]
#
# Three network namespaces, a torchrun with one replica in each, one run folder on a file system of its own. Needs root.

from __future__ import annotations

import random
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.hosts.namespaces import network, reason_to_skip
from benchmarks.hosts.run_on_hosts import Run, wait

LONGEST_RECOVERY_S = 40.0
_COLUMNS = {
    "event": "{event}",
    "number": "{number:.0f}",
    "wrong endings": "{wrong:.0f}",
    "recovery p50 s": "{p50:.1f}",
    "recovery max s": "{worst:.1f}",
}

EVENTS = ("kill_host", "kill_replica", "freeze", "leave", "cut_link", "fill_disk", "damage_log", "change_data", "stop")


def measure(*, num_events: int, minutes: float, seed: int) -> harness.Findings:
    """Have so many events happen to a run, or as many as the minutes allow."""
    reason = reason_to_skip()
    if reason:
        raise SystemExit(f"hosts cannot be made here: {reason}")
    draw, console = random.Random(seed), Console(stderr=True)  # noqa: S311 - no secret
    plan = [kind for _ in range(-(-num_events // len(EVENTS))) for kind in draw.sample(EVENTS, len(EVENTS))][
        :num_events
    ]
    endings: list[tuple[str, str, float | None]] = []
    with tempfile.TemporaryDirectory() as name, network(Path(name), 3) as net:
        run = Run(net, Path(name), draw)
        run.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "hosts", str(run.disk)], check=True)
        try:
            run.start(*run.hosts)
            wait(lambda: run.step() >= 5, what="a first step", run=run)
            began_s = time.monotonic()
            for kind in plan:
                if time.monotonic() - began_s > 60 * minutes:
                    break
                time.sleep(2 * draw.random())
                try:
                    wrong, took_s = getattr(run, kind)()
                except (TimeoutError, subprocess.TimeoutExpired) as error:
                    console.print(f"{kind}: {error}")
                    endings.append((kind, "no recovery", None))
                    break
                console.print(f"{len(endings) + 1}. {kind}: {wrong or 'right'}, {took_s or 0:.1f} s, step {run.step()}")
                endings.append((kind, wrong, took_s))
            run._stop()  # noqa: SLF001 - its own driver
            lost, doubled = run.samples_lost_and_doubled()
        finally:
            for host in net.hosts:
                host.kill()
            subprocess.run(["umount", "-l", str(run.disk)], check=False)
    return _findings(endings, lost=lost, doubled=doubled)


def _findings(endings: list[tuple[str, str, float | None]], *, lost: int, doubled: int) -> harness.Findings:
    recoveries = sorted(took_s for _, _, took_s in endings if took_s is not None) or [0.0]
    figures = {
        "events": len(endings),
        "samples_lost": lost,
        "samples_doubled": doubled,
        "wrong_endings": sum(1 for _, wrong, _ in endings if wrong),
        "recovery_p50_s": statistics.median(recoveries),
        "recovery_p95_s": recoveries[min(int(0.95 * len(recoveries)), len(recoveries) - 1)],
    }
    rows: list[dict[str, str | float]] = []
    for kind, number in Counter(kind for kind, _, _ in endings).items():
        own = sorted(took_s for name, _, took_s in endings if name == kind and took_s is not None) or [0.0]
        wrong = sum(1 for name, found, _ in endings if name == kind and found)
        rows.append({"event": kind, "number": number, "wrong": wrong, "p50": statistics.median(own), "worst": own[-1]})
    held = not (lost or doubled or figures["wrong_endings"]) and figures["recovery_p95_s"] <= LONGEST_RECOVERY_S
    note = (
        f"bounds {'held' if held else 'BROKEN'}: nothing lost or doubled, every ending reported correctly, "
        f"p95 of recovery up to {LONGEST_RECOVERY_S:g} s"
    )
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=note)


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="hosts")
    parser.add_argument("--events", type=int, default=None, help="how many (100; 9 with --quick)")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no event later than this (600)")
    parser.add_argument("--seed", type=int, default=0, help="decides what happens when (0)")
    options = parser.parse_args()
    findings = measure(
        num_events=options.events or (9 if options.quick else 100), minutes=options.minutes, seed=options.seed
    )
    harness.tell(findings, options, question=__doc__, name="hosts", device="cpu")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
