"""Does the meter notice loops in which it cannot be right, and leave the correct ones alone?"""
# python -m benchmarks.misuse [--json PATH|-] [--quick]

from __future__ import annotations

from collections import Counter

from benchmarks import harness
from benchmarks.misuse.random_loops import CORRECT
from benchmarks.misuse.rows import run_loops
from benchmarks.replicas import run_replicas

NUM_LOOPS, NUM_QUICK = 1000, 60
"""Of each kind, correct and misused."""


def measure(quick: bool) -> harness.Findings:  # noqa: FBT001 - the harness's own signature
    """Run the loops of two replicas in one launch, and those of one process in another."""
    number = NUM_QUICK if quick else NUM_LOOPS
    counts: dict[str, Counter[str]] = {}
    for world_size in (2, 1):
        for row in run_replicas(run_loops, world_size=world_size, args=(number,)):
            counts.setdefault(row.pop("misuse"), Counter()).update(row)
    correct = counts[CORRECT]
    misused = sum((count for misuse, count in counts.items() if misuse != CORRECT), Counter[str]())
    figures = {
        "num_loops": float(correct["num_loops"] + misused["num_loops"]),
        "silent_wrong": float(misused["bad"] + correct["wrong"]),
        "false_alarms": float(correct["bad"]),
    }
    rows: list[dict[str, str | float]] = [{"misuse": misuse, **count} for misuse, count in counts.items()]
    columns = {
        "misuse": "{misuse}",
        "loops": "{num_loops}",
        "reported": "{reported}",
        "measured steps": "{measured}",
        "wrong silently, or false alarm": "{bad}",
    }
    note = (
        "last column: among misused loops a wrong number without a word, among correct ones a warning, an error or no "
        "number at all; a misused loop that is measured is one whose numbers are right in spite of it"
    )
    return harness.Findings(figures=figures, rows=rows, columns=columns, note=note)


if __name__ == "__main__":
    harness.run(measure, question=__doc__, name="misuse")
