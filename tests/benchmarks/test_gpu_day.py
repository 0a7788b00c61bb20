"""The GPU day in its CPU form: whole, and on a machine that lacks packages a bare one lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.host_syncs import counted
from benchmarks.gpu.rows import Report, read_rows

ROOT = Path(__file__).parents[2]
WITHOUT = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def without(name, path=None, target=None):
    missing = name.partition(".")[0] in ("wandb", "jsonargparse")
    return None if missing else find_spec(name, path, target)

PathFinder.find_spec = staticmethod(without)
"""


def test_its_cpu_form_passes_without_wandb_and_jsonargparse(tmp_path):
    """Every part ends well, the page says that no GPU was there, and no figure of a GPU is given."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [sys.executable, "-m", "benchmarks.gpu_day", str(tmp_path / "day"), "--minutes", "14"]
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    failed = [line for line in ended.stdout.splitlines() if line.startswith("FAIL")]
    assert (ended.returncode, failed) == (0, []), ended.stderr[-2000:]
    page = (tmp_path / "day" / "gpu_day.md").read_text()
    figures = json.loads((tmp_path / "day" / "gpu_day.json").read_text())["figures"]
    assert "not run on a GPU" in page
    assert figures["ran_on_gpu"] == 0
    assert figures["wrappers_right"] == figures["wrappers_total"] > 10
    assert "mfu_124m" not in figures


def test_rows_of_a_killed_part_are_kept(tmp_path):
    """A line that a kill has torn is left out; those before it, and a check that raised, are there."""
    report = Report(tmp_path / "rows.jsonl", "part")
    report.guarded("fails", lambda: 1 / 0)
    report.add("passes", ok=True, result="fine", figures={"x": 1.0})
    with report.path.open("a") as file:
        file.write('{"part": "par')
    assert [(row["check"], row["ok"]) for row in read_rows(report.path)] == [("fails", False), ("passes", True)]
    assert "ZeroDivisionError" in read_rows(report.path)[0]["result"]


def test_the_stand_in_finds_what_would_wait():
    """Values that are read, and tensors made of host numbers for a device, are counted; arithmetic is not."""
    import torch

    numbers = torch.arange(3.0)
    with counted() as places:
        (numbers * 2).sum()
    assert places == []
    with counted() as places:
        numbers.sum().item()
        torch.tensor([1.0], device="cpu")
        bool(numbers[1] > 0)
    assert len(places) == 3
