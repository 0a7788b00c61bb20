"""What `import dptrain` brings along and what it costs, in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"wandb", "transformers", "lightning", "accelerate", "matplotlib", "scipy", "jsonargparse", "sklearn"}

pytestmark = pytest.mark.timeout(600)  # a dozen interpreters that load torch, each some seconds on a busy machine
_RUNS = 3
_REPORT = """
import json, resource, sys
import {module}
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{"cpu_s": used.ru_utime + used.ru_stime, "modules": sorted(sys.modules)}}))
"""


def imported(module):
    """Import a module in a fresh interpreter: CPU seconds of its life, and the modules at its end."""
    command = [sys.executable, "-c", _REPORT.format(module=module)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_nothing_heavy_comes_along():
    """A loop that only measures loads no tracker, no framework, no figures and no command line."""
    modules = {name.split(".")[0] for name in imported("dptrain")["modules"]}
    assert "torch" in modules
    assert not modules & HEAVY


def test_it_takes_little_longer_than_torch():
    """The aim is a tenth more than torch; a quarter here, so that only a heavy import can fail it.

    CPU seconds instead of wall, the best of pairs in turn: all against what else runs on the machine. The interpreter's
    own start is in both.
    """
    for module in ("torch", "dptrain"):
        imported(module)  # files into the cache, byte code onto the disk
    pairs = [(imported("torch")["cpu_s"], imported("dptrain")["cpu_s"]) for _ in range(_RUNS)]
    torch_s, dptrain_s = (min(times) for times in zip(*pairs, strict=True))
    assert dptrain_s <= 1.25 * torch_s, f"import dptrain {dptrain_s:.2f} s, import torch {torch_s:.2f} s"
