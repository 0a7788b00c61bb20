"""Does dptrain hold on a GPU what it holds on CPUs, and how fast is it there?"""
# python -m benchmarks.gpu_day FOLDER [--minutes M] [--parts NAME,…]; without a GPU it runs small, in a minute or two

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import dptrain
from benchmarks.gpu.rows import ON_GPU, Report, Row, read_rows
from benchmarks.result_tables import figures_table

NOT_RUN = "**not run on a GPU**"
WHEELS = Path(__file__).parents[1] / ".wheels"
"""Ignored folder for packages that the machine lacks; they are unpacked, not installed."""
_MARGIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """A question that a process of its own answers.

    Attributes:
        module: of `benchmarks.gpu`.
        function: of it, called with a report.
        question: head of its section.
        limit_s: seconds on a GPU after which it is killed; on a CPU the time for all parts is the only limit.
    """

    module: str
    function: str = "measure"
    question: str
    limit_s: float


PARTS: Mapping[str, Part] = {
    "waits": Part(module="synchronisation", question="Does a step make the host wait?", limit_s=60),
    "wrappers": Part(module="wrappers", question="Is the meter right in each wrapper?", limit_s=90),
    "replicas": Part(module="replicas", question="Do two replicas equal one?", limit_s=60),
    "speed": Part(module="speed", question="How fast is a GPT?", limit_s=240),
    "run": Part(module="whole_run", question="Does a whole run hold?", limit_s=90),
    "hooks": Part(module="hook_cost", question="What does every=1 cost by parameters?", limit_s=30),
    "adapt": Part(module="whole_run", function="adapt", question="Does the batch adapt by default?", limit_s=140),
}
"""Most valuable first: what the time does not suffice for is left out from the end."""


def run_part(name: str, record: Path) -> None:
    """Answer one question in this process, within a group of one where the part needs a group."""
    part = PARTS[name]
    module = importlib.import_module(f"benchmarks.gpu.{part.module}")
    measure = getattr(module, part.function)
    if name != "wrappers":
        measure(Report(record, name))
        return
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as store:
        backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}/store", rank=0, world_size=1)
        measure(Report(record, name))
        dist.destroy_process_group()


def main(folder: Path, *, names: list[str], minutes: float) -> int:
    """Run the parts, write the record and the page, and return how many checks failed."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "gpu_day.jsonl"
    record.unlink(missing_ok=True)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as site:
        environment = _environment_of_parts(Path(site))
        for name in names:
            left_s = 60 * minutes - (time.monotonic() - began_s)
            _run(name, record, limit_s=min(PARTS[name].limit_s, left_s) if ON_GPU else left_s, environment=environment)
            _write(folder, record, seconds=time.monotonic() - began_s)
    return sum(not row["ok"] for row in read_rows(record))


def _run(name: str, record: Path, *, limit_s: float, environment: Mapping[str, str]) -> None:
    report = Report(record, name)
    if limit_s < _MARGIN_S:
        report.add("time", ok=True, result="left out: no time was left")
        return
    command = [sys.executable, "-m", "benchmarks.gpu_day", str(record), "--part", name]
    process = subprocess.Popen(command, env=dict(environment))
    try:
        code = process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        report.add("time", ok=False, result=f"killed after {limit_s:.0f} s; what it had found is above")
        return
    if code:
        report.add("process", ok=False, result=f"ended with exit code {code}")


def _environment_of_parts(site: Path) -> dict[str, str]:
    for wheel in sorted(WHEELS.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    here = str(Path(__file__).parents[1])
    paths = [here, os.environ.get("PYTHONPATH", ""), str(site)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def _write(folder: Path, record: Path, *, seconds: float) -> None:
    rows = read_rows(record)
    environment = {
        "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "dptrain": dptrain.__version__,
        "seconds": f"{seconds:.0f}",
    }
    figures = _figures(rows)
    answer = {"question": __doc__, "environment": environment, "figures": figures, "rows": rows}
    (folder / "gpu_day.json").write_text(json.dumps(answer, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "gpu_day.md").write_text(_page(rows, environment=environment, figures=figures), encoding="utf-8")


def _figures(rows: list[Row]) -> dict[str, float]:
    """Return the figures on record; those of the CPU check are none of a GPU's, and are left out."""
    figures: dict[str, float] = {"ran_on_gpu": float(ON_GPU)}
    wrappers = [row for row in rows if row["part"] in ("wrappers", "replicas") and "right" in row["figures"]]
    figures["wrappers_right"] = float(sum(row["figures"]["right"] for row in wrappers))
    figures["wrappers_total"] = float(len(wrappers))
    if ON_GPU:
        for row in rows:
            figures |= {name: value for name, value in row["figures"].items() if name != "right"}
    return figures


def _page(rows: list[Row], *, environment: Mapping[str, str], figures: Mapping[str, float]) -> str:
    lines = [f"# {__doc__}", ""]
    if not ON_GPU:
        lines += [f"{NOT_RUN}: these are the same checks on a CPU, small, with gloo in place of NCCL.", ""]
    lines += [", ".join(f"{name} {value}" for name, value in environment.items()), ""]
    for name, part in PARTS.items():
        of_part = [row for row in rows if row["part"] == name]
        if not of_part:
            continue
        lines += [f"## {part.question}", "", "| check | | result |", "|---|---|---|"]
        lines += [
            f"| {_cell(row['check'])} | {'ok' if row['ok'] else '**FAILED**'} | {_cell(row['result'])} |"
            for row in of_part
        ]
        lines.append("")
    lines += [
        "## Figures",
        "",
        figures_table(figures),
        _NOTE,
        "",
    ]
    return "\n".join(lines)


_NOTE = (
    "Wrappers: a group of one; |G|² and tr(Σ) of one step of two micro-batches against plain gradients, and "
    "parameters bit-identical after three steps with and without the meter. Speed: medians over turns of four "
    "steps, variants in turns in one process, after compilation; MFU by 6 FLOPs per parameter and token and full "
    "attention, of the dense bf16 peak. A group of one says nothing of the cost of communication."
)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for gpu_day.md, gpu_day.json and gpu_day.jsonl")
    parser.add_argument("--minutes", type=float, default=9.0, help="longest time (default 9)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, in their order (default all)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    given = _parsed()
    if given.part:
        run_part(given.part, given.folder)
        sys.exit(0)
    sys.exit(min(main(given.folder, names=given.parts.split(","), minutes=given.minutes), 1))
