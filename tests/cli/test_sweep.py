"""`dptrain sweep` on real runs of a fraction of a second: killed, stopped, gone on with, extended; and its refusals."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time

import pytest

from dptrain.cli.sweep import _sentences, sweep
from dptrain.cli.sweep_request import read_request
from dptrain.errors import DptrainError
from dptrain.sweep import Outcome
from tests import regression
from tests.replicas import _context

TOY = {
    "task": f"{regression.__file__}:build",
    "device": "cpu",
    "optimizer.name": "sgd",
    "optimizer.beta1": "0",
    "optimizer.weight_decay": "0",
    "optimizer.max_grad_norm": "null",
    "optimizer.warmup_samples": "0",
    "control.mode": "off",
    "checkpoint.every_samples": "64",
    "log.eval_every_samples": "4",
    "log.tracker": "none",
    "replica_check_every_steps": "0",
}


class Started:
    """A sweep in a process that has all of it loaded already."""

    def __init__(self, folder, *options, settings=TOY):
        arguments = [f"--out={folder}", *options, *(f"--{name}={value}" for name, value in settings.items())]
        self.folder = folder
        self.said = folder.parent / f"{folder.name}-{len(list(folder.parent.iterdir()))}"
        self.process = _context.Process(target=_sweep, args=(arguments, self.said))
        self.process.start()

    def wait(self):
        self.process.join(300)
        return self.process.exitcode

    def text(self, stream):
        return self.said.with_suffix(f".{stream}").read_text()

    def wait_for_evaluations(self, number):
        """Wait until all runs together have reported so many, or the sweep is over."""
        while self.process.is_alive() and evaluations(self.folder) < number:
            time.sleep(0.01)


def _sweep(arguments, said):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - the process ends with them
    try:
        code = sweep(arguments)
    except DptrainError as error:
        sys.stderr.write(f"{error}\n")
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_refused(started):
    """Whether it did not start because replicas of a sweep that was killed still hold a folder of it."""
    return started.process.exitcode == 2 and "is in use" in started.text("err")


def evaluations(folder):
    logs = folder.glob("runs/*/metrics.jsonl")
    return sum(log.read_bytes().count(b'"kind": "eval"') for log in logs)


def rows(folder):
    """The table without clock times."""
    with (folder / "table.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def fit(folder):
    return json.loads((folder / "fit.json").read_text())


ASKED = ("--global-batch-sizes=4,16,64", "--targets=2.0,1.6", "--seeds=1")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    started = Started(tmp_path_factory.mktemp("sweep") / "whole", *ASKED)
    assert started.wait() == 0, started.text("err")
    return started


def test_a_sweep_leaves_a_table_and_its_fits(done):
    """One row per run and target, run folders of `dptrain train`, and a sentence for each target."""
    found = rows(done.folder)
    assert {row["target"] for row in found} == {"2.0", "1.6"}
    assert {row["global_batch_size"] for row in found if row["chosen"] == "true"} == {"4", "16", "64"}
    assert all(row["reached"] == "true" for row in found if row["chosen"] == "true")
    names = {f"batch-{r['global_batch_size']}-lr-{r['learning_rate']}-seed-{r['seed']}" for r in found}
    assert {path.name for path in (done.folder / "runs").iterdir()} == names
    text = done.text("out")
    for target in fit(done.folder)["targets"]:
        assert target["sentence"] in text
        assert set(target["rates"]) == {"4", "16", "64"}
    assert (done.folder / "table.parquet").exists() == ("table.parquet" in text)


def test_the_rate_is_searched_until_it_is_not_at_the_edge(done):
    """Of each batch and target the chosen rate has a slower and a faster one beside it."""
    for target in fit(done.folder)["targets"]:
        for batch, rate in target["rates"].items():
            tried = {float(row["learning_rate"]) for row in rows(done.folder) if row["global_batch_size"] == batch}
            assert min(tried) < rate < max(tried)


def test_runs_are_as_they_were_asked_for(done):
    """At one batch and one rate from beginning to end, and stopped when all targets were reached."""
    (run, *_) = sorted((done.folder / "runs").glob("batch-16-*"))
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in logged if row["kind"] == "train"]
    assert {row["batch/global"] for row in steps} == {16}
    assert len({row["train/lr"] for row in steps}) == 1
    assert f"-lr-{steps[0]['train/lr']:g}-" in run.name
    assert steps[-1]["progress/samples"] < 1600


def test_progress_is_reported_line_by_line(done):
    """Each run says at its end what it came to, and how many there are."""
    lines = done.text("err").splitlines()
    assert sum("samples (" in line and "runs so far" in line for line in lines) >= 9
    assert "3 of 3 batches done" in lines[-1]


def test_a_sweep_killed_three_times_ends_with_the_same_table(done, tmp_path):
    """Wherever it was killed with all its runs, and whatever they had saved by then."""
    total = evaluations(done.folder)
    points = sorted(random.Random(6).sample(range(total // 10, total), 3))
    for point in points:
        started = Started(tmp_path / "killed", *ASKED)
        started.wait_for_evaluations(point)
        started.process.kill()
        assert started.wait() in (-signal.SIGKILL, 0) or is_refused(started), started.text("err")
    for _ in range(20):
        started = Started(tmp_path / "killed", settings={})
        started.wait()
        if not is_refused(started):
            break
    assert started.wait() == 0, started.text("err")
    assert rows(tmp_path / "killed") == rows(done.folder)
    assert fit(tmp_path / "killed") == fit(done.folder)


def test_a_sweep_that_is_stopped_says_how_to_go_on(tmp_path):
    """With exit code 75, its runs saved, and a table of what there is; and it goes on with the folder alone."""
    started = Started(tmp_path / "stopped", "--global-batch-sizes=4", "--targets=0.5", "--seeds=1")
    started.wait_for_evaluations(3)
    os.kill(started.process.pid, signal.SIGINT)
    assert started.wait() == 75, started.text("err")
    assert f"continue with dptrain sweep --out {tmp_path / 'stopped'}" in started.text("err")
    assert "unfinished" in {row["status"] for row in rows(tmp_path / "stopped")}
    assert not (tmp_path / "stopped" / "fit.json").exists()
    assert any((tmp_path / "stopped").glob("runs/*/checkpoints/step-*"))


def test_a_sweep_that_is_done_takes_a_further_target(done):
    """One between those that there are is found in the runs that there are: none is trained again."""
    before = evaluations(done.folder)
    started = Started(done.folder, "--targets=2.0,1.8,1.6", settings={})
    assert started.wait() == 0, started.text("err")
    assert evaluations(done.folder) == before
    assert len({row["target"] for row in rows(done.folder)}) == 3


def test_other_settings_are_refused(done):
    """The folder would mix runs that do not belong together."""
    started = Started(done.folder, *ASKED, settings={**TOY, "optimizer.beta1": "0.5"})
    assert started.wait() == 2
    assert "optimizer.beta1 was 0 and is 0.5" in started.text("err").replace("0.0", "0")


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ([], {}, "--global-batch-sizes is missing"),
        (["--global-batch-sizes=8"], {}, "--targets is missing"),
        (["--global-batch-sizes=8,x", "--targets=1"], {}, "must be whole numbers with commas"),
        (["--global-batch-sizes=8", "--targets=low"], {}, "must be numbers with commas"),
        (["--global-batch-sizes=8", "--targets=1"], {"config": "/nowhere.yaml"}, "cannot read settings file"),
        (["--global-batch-sizes=8", "--targets=1"], {"task": "digitz"}, "did you mean 'digits'"),
        (["--global-batch-sizes=8", "--targets=1", "--seeds=0"], {"task": "quadratic"}, "--seeds must be at least 1"),
        (["--global-batch-sizes=8", "--targets=1"], {"task": "quadratic", "optimizer.nam": "sgd"}, "did you mean"),
        (["--global-batch-sizes=4,7", "--targets=1", "--replicas=2"], {"task": "quadratic"}, "7 is not reachable"),
        (["--global-batch-sizes=8", "--targets=1", "--parallel=0"], {"task": "quadratic"}, "--parallel must be"),
        (["--global-batch-sizes=8", "--targets=1", "--resume"], {"task": "quadratic"}, "no meaning for a sweep"),
    ],
)
def test_nonsense_is_one_sentence(options, settings, said, tmp_path):
    """Before anything is trained, and no folder is left."""
    arguments = [f"--out={tmp_path / 'sweep'}", *options, *(f"--{name}={value}" for name, value in settings.items())]
    with pytest.raises(DptrainError, match=said) as refused:
        sweep(arguments)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "sweep").exists()


def test_what_is_unknown_is_reported_so():
    """Batches out of reach, batches that were there before the first look, rates at the edge: a line for each."""
    spec = read_request(["--task=quadratic", "--global-batch-sizes=4,8,16", "--targets=1.0", "--seeds=1"]).spec
    outcome = Outcome(
        target=1.0, rates={4: 0.1, 16: 0.2}, at_edge=[16], early=[4], frontier=None, sentence="no frontier"
    )
    first, *more = _sentences(spec, outcome)
    assert first == "target 1: no frontier"
    assert [(line.split(",")[0].split(":")[0].strip(), line.count("batch")) for line in more] == [
        ("one seed", 0),
        ("not reached by every seed at any learning rate", 1),
        ("reached before the first evaluation", 1),
        ("best learning rate at the edge of the grid", 1),
    ]
    assert all(batch in line for line, batch in zip(more[1:], ("batch 8", "batch 4", "batch 16"), strict=True))


def test_a_preset_of_rules_is_left_out_as_the_rules_are():
    """The batch of each run is constant, so a rule has nothing to follow; the refusal named one that nobody gave."""
    options = ["--task=quadratic", "--global-batch-sizes=4,8,16", "--targets=1.0", "--seeds=1"]
    plain, preset = (read_request([*options, *more]) for more in ([], ["--optimizer.preset=per_sample"]))
    assert preset.config == plain.config
    assert preset.spec == plain.spec
