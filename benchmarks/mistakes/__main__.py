"""Is each mistake in settings and task files refused in one sentence, and does all that is accepted run?"""
# python -m benchmarks.mistakes [--files N] [--seed S] [--json PATH|-] [--quick]

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from benchmarks import harness
from benchmarks.mistakes.fuzzed_files import Trial, try_files

NUM_FILES, NUM_QUICK = 1000, 60
_COLUMNS = {"files": "{kind}", "number": "{number}", "accepted, and ran": "{accepted}", "wrong": "{wrong}"}
_REPLICA = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "OMP_NUM_THREADS": "1",
}
"""The environment of a replica, so that the command trains in this process and starts no others."""


def measure(*, num_files: int, seed: int) -> harness.Findings:
    """Try so many files; print each complaint with its file as it comes."""
    torch.set_num_threads(1)
    os.environ.update(_REPLICA)
    console = Console(stderr=True)

    def note(trial: Trial) -> None:
        if trial.wrong:
            console.print(f"{trial.wrong}:\n{trial.content}\n{trial.reported}", markup=False, highlight=False)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=0, world_size=1)
        trials = try_files(folder, number=num_files, seed=seed, noted=note)
        dist.destroy_process_group()
    rows: list[dict[str, str | float]] = []
    for kind, number in Counter(trial.kind for trial in trials).items():
        own = [trial for trial in trials if trial.kind == kind]
        rows.append(
            {
                "kind": kind,
                "number": number,
                "accepted": sum(trial.accepted for trial in own),
                "wrong": sum(1 for trial in own if trial.wrong),
            }
        )
    wrong = sum(1 for trial in trials if trial.wrong)
    figures = {"files": len(trials), "accepted": sum(trial.accepted for trial in trials), "wrong": wrong}
    note_below = (
        f"bound {'held' if not wrong else 'BROKEN'}: a refusal is exit code 2 and one line, what is accepted runs to "
        "its end (or until it is stopped, or diverges, which is said), and harmless oddities are accepted"
    )
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=note_below)


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="mistakes")
    parser.add_argument("--files", type=int, default=None, help="how many (1000; 60 with --quick)")
    parser.add_argument("--seed", type=int, default=1, help="decides what stands in them (1)")
    options = parser.parse_args()
    findings = measure(num_files=options.files or (NUM_QUICK if options.quick else NUM_FILES), seed=options.seed)
    harness.tell(findings, options, question=__doc__, name="mistakes", device="cpu")


if __name__ == "__main__":
    main()
