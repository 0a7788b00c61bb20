"""What `import dptrain` brings along and what it costs, in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"wandb", "transformers", "lightning", "accelerate", "matplotlib", "scipy", "jsonargparse", "sklearn"}

_RUNS = 3
_REPORT = """
import json, sys, time
began = time.process_time()
import torch
between = time.process_time()
import dptrain
ended = time.process_time()
print(json.dumps({"torch": between - began, "dptrain": ended - between, "modules": sorted(sys.modules)}))
"""


def imported():
    """Import torch, then dptrain, in a fresh interpreter: CPU seconds of each, and the modules at its end."""
    done = subprocess.run([sys.executable, "-c", _REPORT], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_nothing_heavy_comes_along():
    """A loop that only measures loads no tracker, no framework, no figures and no command line."""
    modules = {name.split(".")[0] for name in imported()["modules"]}
    assert "torch" in modules
    assert not modules & HEAVY


def test_it_takes_at_most_a_tenth_longer_than_torch():
    """What dptrain adds to the import of torch, with all that it brings along, is at most a tenth of it.

    CPU seconds instead of wall, in one interpreter one after the other, the best of three: against what else runs on
    the machine.
    """
    imported()  # files into the cache, byte code onto the disk
    found = [imported() for _ in range(_RUNS)]
    torch_s, dptrain_s = (min(times[name] for times in found) for name in ("torch", "dptrain"))
    assert dptrain_s <= 0.1 * torch_s, f"import dptrain adds {dptrain_s:.3f} s to {torch_s:.2f} s of torch"
