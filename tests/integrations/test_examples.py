"""Each pair of examples runs as its README says, on two processes, and the one with dptrain tells a noise scale."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import json
import os
import re
import runpy
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.replicas import run_replicas

EXAMPLES = Path(__file__).parents[2] / "examples"
PAIRS = ["plain_ddp", "accelerate_loop", "lightning_trainer", "transformers_trainer"]


def run_script(rank, world_size, path, folder):
    """Run a script in the environment of torchrun and return what it printed; it finds no process group yet."""
    port = [None]
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = [probe.getsockname()[1]]
    dist.broadcast_object_list(port, src=0)
    dist.destroy_process_group()
    os.environ.update(MASTER_PORT=str(port[0]), ACCELERATE_USE_CPU="true")
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


@pytest.mark.parametrize(
    "name", [*(f"{pair}{with_it}" for pair in PAIRS for with_it in ("", "_dptrain")), "plain_ddp_adaptive"]
)
def test_the_example_runs(name, tmp_path):
    """It trains to its end; with dptrain, what rank 0 prints has the noise scale in it."""
    framework = name.partition("_")[0]
    if framework != "plain" and importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")
    printed = run_replicas(run_script, world_size=2, args=(str(EXAMPLES / f"{name}.py"), str(tmp_path)))[0]
    assert "loss" in printed
    assert bool(re.search("noise scale|noise_scale/", printed)) == name.endswith(("_dptrain", "_adaptive"))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_differs_by_few_lines(pair):
    """Hardly a line is taken out of the plain loop, and the README names both files."""
    plain, with_it = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in (pair, f"{pair}_dptrain"))
    assert len(set(plain) - set(with_it)) <= 4
    assert len(set(with_it) - set(plain)) <= 14
    assert all(f"`{name}.py`" in (EXAMPLES / "README.md").read_text() for name in (pair, f"{pair}_dptrain"))


def test_adapting_a_plain_loop_takes_at_most_eight_lines():
    """Added and changed lines together, the first one of the script's description included."""
    plain, adaptive = ((EXAMPLES / name).read_text().splitlines() for name in ("plain_ddp.py", "plain_ddp_adaptive.py"))
    changes = [line for line in difflib.ndiff(plain, adaptive) if line.startswith("+ ") and line[2:].strip()]
    assert len(changes) <= 8, changes


def test_the_notebook_runs(capsys):
    """Each code cell runs in turn, and the last one prints the batch that the law chose."""
    cells = json.loads((EXAMPLES / "noise_scale.ipynb").read_text(encoding="utf-8"))["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102 - the notebook is ours
    assert names["scale"].lower > 0
    assert names["adapter"].global_batch_size > 32
    assert str(names["adapter"].global_batch_size) in capsys.readouterr().out
