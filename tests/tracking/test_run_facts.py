"""What a run is, in its first line and in `run.json`."""

from __future__ import annotations

from dataclasses import replace

from dptrain.tracking.run_facts import RunFacts
from dptrain.version import __version__

FACTS = RunFacts(
    task="digits-mlp",
    num_parameters=4_810,
    num_trained_parameters=4_810,
    gradient_bytes=4 * 4_810,
    num_samples=1_497,
    num_held_out=300,
    world_size=2,
    device="cpu",
    device_name=None,
    torch_version="2.9.0",
)


def test_the_line_names_what_is_trained_and_where():
    """Task, parameters, samples, replicas with their device, and folder; a GPU by its name."""
    assert FACTS.line(run_dir="runs/a") == (
        "digits-mlp | 4.8k parameters | 1,497 samples, 300 held out | 2 cpu replicas | runs/a"
    )
    gpu = replace(FACTS, num_held_out=None, world_size=1, device="cuda", device_name="NVIDIA H200")
    assert gpu.line(run_dir="a") == "digits-mlp | 4.8k parameters | 1,497 samples | 1 NVIDIA H200 replica | a"


def test_the_record_has_date_and_versions():
    """What a reader of the report asks first."""
    record = FACTS.record()
    assert record["dptrain_version"] == __version__
    assert record["num_parameters"] == 4_810
    assert str(record["started"]).startswith("20")
