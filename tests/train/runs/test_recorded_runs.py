"""Fixed-seed runs under laws that read no clock, held to digests on record: a change of structure changes no result."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dptrain.tracking.jsonl import read_rows

ONE_KERNEL = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
"""The same kernels on every x86-64 processor, so that the digests hold beyond the machine that made them."""

RECORDED = {
    "constant": (
        "f209e78d8686a44cc04efb68e76f24422ef2d889e09e001ca93a2ab61e353058",
        "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945",
    ),
    "noise": (
        "ab4f2252b65157383e4c4d48699ed3026249b9304796adc245a67622269c0f5c",
        "78b3e2fd4e7e5fef8823dfb2c8480744beb1cff673f145034bab4ef9d9baf549",
    ),
}
"""law → (sha256 of the parameters, sha256 of the decisions), of torch 2.13 on x86-64.

The noise law was recorded anew when it began to compare the batches of the grid, in place of bands and dwell times. Its
parameters alone were when the noise scale now began to allow for flicker: the learning rate follows the noise scale, and
the decisions stayed.
"""


def digests(folder, law):
    """Train `digits` on two replicas and return the digests of its parameters and of its decisions."""
    subprocess.run(
        [
            *(sys.executable, "-m", "dptrain", "train", "--task", "digits", "--replicas", "2", "--device", "cpu"),
            *("--max_samples", "12000", "--seed", "3", "--control.law", law, "--log.tracker", "none"),
            *("--run_dir", str(folder)),
        ],
        env={**os.environ, **ONE_KERNEL},
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    newest = max(Path(folder, "checkpoints").glob("step-*"))
    parameters = hashlib.sha256()
    for name, value in sorted(load_file(newest / "model.safetensors").items()):
        parameters.update(name.encode() + value.numpy().tobytes())
    rows = read_rows(folder / "decisions.jsonl")
    decided = [(row["step"], row["batch/before"], row["batch/after"]) for row in rows]
    decided = [change for change in decided if change[1] != change[2]]
    return parameters.hexdigest(), hashlib.sha256(repr(decided).encode()).hexdigest(), decided


@pytest.mark.parametrize("law", sorted(RECORDED))
def test_a_fixed_seed_gives_the_bytes_on_record(tmp_path, law):
    """The parameters and the decisions of a fixed seed are those of the commit that recorded them."""
    parameters, decisions, decided = digests(tmp_path / "run", law)
    assert (parameters, decisions) == RECORDED[law], decided
