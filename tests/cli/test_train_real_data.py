"""Data as users have it, from one command: nanoGPT's folder, a model folder of transformers, a folder of PNG files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tasks.made_data import make_hf_model, make_nanogpt_folder, make_png_folder, make_texts

ROOT = Path(__file__).parents[2]
VISION = Path(sys.prefix) / "vision"
"""timm and torchvision lie apart, see the Makefile: those of PyPI do not import beside a CPU build of torch."""

SETTINGS = {
    "max_samples": 81,
    "global_batch_size": 16,
    "micro_batch_size": 4,
    "layout_replicas": 2,
    "log.eval_every_samples": 40,
    "log.tracker": "none",
    "control.law": "constant",
    "noise.every": 1,
    "checkpoint.every_samples": 32,
    "device": "cpu",
}


def make_gpt(folder):
    """Tokens of a nanoGPT folder."""
    return {"data": str(make_nanogpt_folder(folder / "data")), "context": 32, "width": 32, "vocab_size": 96}


def make_huggingface(folder):
    """A model folder and a data set folder."""
    return {"model": str(make_hf_model(folder / "model")), "data": str(make_texts(folder / "data"))}


def make_images(folder):
    """PNG files for a residual network of timm with batch norms."""
    return {"data": str(make_png_folder(folder / "data")), "model": "timm:test_resnet", "size": 32}


KINDS = {
    "gpt": (make_gpt, "perplexity"),
    "huggingface": (make_huggingface, "perplexity"),
    "images": (make_images, "accuracy"),
}


def run(arguments, *, kind):
    paths = [str(ROOT), *([str(VISION)] if kind == "images" else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def on_one_replica(kind, options, folder):
    """Train straight, and again with a death in step 3; say whether both left the same, and what was found."""
    from dptrain.config.settings_file import build_config
    from tests import runs

    settings = {}
    for name, value in SETTINGS.items():
        group, _, key = name.rpartition(".")
        (settings.setdefault(group, {}) if group else settings)[key] = value
    results = {}
    for name, deaths in (("straight", []), ("killed", [3])):
        run_dir = Path(folder) / name
        config = build_config({**settings, "task": kind, "task_options": options, "run_dir": str(run_dir)})
        for death in [*deaths, None]:
            try:
                runs.attempt(run_dir, kill_at=death, config=config, task=None)
            except runs.Killed:
                assert death is not None
        results[name] = runs.result_of(run_dir)
        del results[name]["state"]["config"]
    runs.assert_same(results["killed"], results["straight"])
    print(json.dumps(results["straight"]["summary"]))  # noqa: T201 - what the test reads


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_resumes_and_is_the_same_on_one_and_two_replicas(kind, tmp_path):
    """One command ends with an accuracy or a perplexity; a killed run ends in the same bytes; so does one replica."""
    if kind == "images" and not VISION.is_dir():
        pytest.skip(f"timm and torchvision are not in {VISION}: `make env` puts them there")
    make, figure = KINDS[kind]
    options = make(tmp_path)
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    flags += [f"--task_options={json.dumps(options)}", "--run_dir", str(tmp_path / "two")]
    run(["-m", "dptrain", "train", "--task", kind, "--replicas", "2", *flags], kind=kind)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    call = f"on_one_replica({kind!r}, {options!r}, {str(tmp_path)!r})"
    one = json.loads(run(["-c", f"from tests.cli.test_train_real_data import *; {call}"], kind=kind).splitlines()[-1])
    assert two["samples_seen"] == one["samples_seen"] == 81
    assert two[figure] > 0
    for name in ("eval_loss", figure, "loss_last"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
