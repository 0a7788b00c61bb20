"""`dptrain train` as a user meets it: what is refused, in which words, and what is left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from unittest import mock

import pytest
import yaml

from dptrain.cli import main as command
from dptrain.cli import settings as settings_of
from dptrain.cli import train as train_command
from dptrain.cli.main import main
from dptrain.config.tokens import IN_SAMPLES
from dptrain.train import TrainConfig
from tests.replicas import run_replicas


def outcome(arguments):
    """Run the command in this process; return (exit code, stdout, stderr)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as ended:
            code = ended.code
    return code, stdout.getvalue(), stderr.getvalue()


@pytest.fixture
def start(monkeypatch):
    """Take the place of the launcher: note what would be started, and start nothing."""
    started = []

    def note(arguments, *, num_replicas, **_):
        settings = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
        started.append((settings, "--resume" in arguments, num_replicas))
        return 0

    monkeypatch.setattr(train_command, "start_replicas", note)
    return started


def assert_one_sentence(stderr, *parts):
    assert stderr.startswith("dptrain train: ")
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    for part in parts:
        assert part in stderr


# Refused before a replica is started

FILES = {
    "empty.yaml": "",
    "list.yaml": "[1, 2]\n",
    "text.yaml": "seed\n",
    "broken.yaml": "seed: [1\n",
    "unknown.yaml": "sede: 1\n",
    "nested.yaml": "optimizer:\n  lerning_rate: 1\n",
    "flat.yaml": "optimizer: 3\n",
    "type.yaml": "control:\n  critical_ratio: much\n",
    "range.yaml": "max_samples: 0\n",
    "binary.yaml": b"\xff\xfe\x00",
}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--sede 1", ["no option --sede", "did you mean --seed?"]),
        ("--max_sample 1", ["no option --max-sample", "did you mean --max-samples?"]),
        ("--learning_rate 1", ["no option --learning-rate", "did you mean --optimizer.learning-rate?"]),
        ("--optimizer.learnin_rate 1", ["did you mean --optimizer.learning-rate?"]),
        ("--optimiser.beta1 0", ["did you mean --optimizer.beta1?"]),
        ("--xyzzy 1", ["no option --xyzzy"]),
        ("digits", ["no place for 'digits'", "--task digits"]),
        ("--seed one", ["seed must be int", "'one'"]),
        ("--seed 1.5", ["seed must be int", "'1.5'"]),
        ("--seed 99999999999999999999", ["seed must be", "2⁶³"]),
        ("--max_samples 0", ["max_samples must be at least 1, got 0"]),
        ("--optimizer.beta1 x", ["optimizer.beta1 must be float", "'x'"]),
        ("--optimizer.beta1 1", ["optimizer.beta1 must be in [0, 1)", "1.0"]),
        ("--control.law newest", ["control.law must be one of 'goodput', 'noise'", "'newest'"]),
        ("--noise.groups 3", ["noise.groups must be bool or one of 'experts', 'local_blocks', got '3'"]),
        ("--model.quantize int9", ["model.quantize must be one of 'bf16', 'fp8'", "'int3' or null, got 'int9'"]),
        ("--optimizer 3", ["optimizer is a group of settings", "--optimizer.name"]),
        ("--task_options 3", ["task_options must be dict"]),
        ('--control {"nope":3}', ["no setting control.nope"]),
        ("--control.law schedule", ["control.law=schedule needs control.schedule"]),
        ("--replicas 0", ["--replicas must be at least 1, got 0"]),
        ("--replicas -1", ["--replicas must be at least 1, got -1"]),
        ("--replicas two", ["replicas must be int", "'two'"]),
        ("--resume", ["--resume needs --run-dir"]),
        ("--config missing.yaml", ["cannot read settings file missing.yaml: No such file"]),
        ("--config .", ["cannot read settings file .: Is a directory"]),
        ("--config empty.yaml", ["settings file empty.yaml must hold names with values", "got nothing"]),
        ("--config list.yaml", ["list.yaml must hold names with values", "got [1, 2]"]),
        ("--config text.yaml", ["text.yaml must hold names with values", "got 'seed'"]),
        ("--config broken.yaml", ["broken.yaml is not YAML in line 2"]),
        ("--config=unknown.yaml", ["no setting sede, in unknown.yaml; did you mean seed?"]),
        ("--config nested.yaml", ["no setting optimizer.lerning_rate, in nested.yaml", "optimizer.learning_rate?"]),
        ("--config flat.yaml", ["optimizer in flat.yaml must be a group of settings, got 3"]),
        ("--config type.yaml", ["control.critical_ratio must be float", "'much'"]),
        ("--config range.yaml", ["max_samples must be at least 1, got 0"]),
        ("--config binary.yaml", ["binary.yaml"]),
    ],
)
def test_settings_that_are_wrong_are_reported_in_one_sentence(tmp_path, monkeypatch, arguments, parts):
    """With the name, what it should be and what it is; exit code 2, and no replica is started."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    started = mock.Mock()
    monkeypatch.setattr("multiprocessing.context.ForkContext.Process", started)
    code, stdout, stderr = outcome(["train", *arguments.split()])
    assert (code, stdout) == (2, "")
    assert_one_sentence(stderr, *parts)
    assert not started.called
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("option", "instead"),
    [("--replicas", "--nproc-per-node"), ("--max-restarts", "MAX_RESTARTS"), ("--grace", "DPTRAIN_GRACE_S")],
)
def test_a_replica_refuses_what_its_launcher_decides(monkeypatch, option, instead):
    """Options of dptrain's own launcher would be ignored under torchrun; the sentence says what to use there."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train_command, "_train_here", lambda *_, **__: pytest.fail("it trains"))
    code, _, stderr = outcome(["train", option, "2"])
    assert code == 2
    assert_one_sentence(stderr, f"{option} has no meaning under a launcher", instead)


# What reaches the replicas


def test_the_later_setting_wins(tmp_path, start):
    """File over default, command line over file, whatever the order of names in them."""
    path = tmp_path / "a.yaml"
    path.write_text("seed: 1\noptimizer: {beta1: 0.5, beta2: 0.6}\n")
    assert outcome(["train", "--config", path, "--optimizer.beta1", "0.7", "--replicas", "3", "--run_dir", "r"])[0] == 0
    ((settings, resume, num_replicas),) = start
    assert (settings["seed"], settings["optimizer"]["beta1"], settings["optimizer"]["beta2"]) == (1, 0.7, 0.6)
    assert (settings["run_dir"], resume, num_replicas) == ("r", False, 3)


def test_values_of_every_type_are_read(start):
    """Numbers with exponents, null, true, and options of the task as YAML."""
    more = [
        "--optimizer.learning_rate",
        "1e-3",
        "--optimizer.max_grad_norm",
        "null",
        "--noise.groups",
        "true",
    ]
    assert outcome(["train", *more, "--task_options", "{width: 3, name: a}", "--device", "cpu"])[0] == 0
    ((settings, _, num_replicas),) = start
    assert settings["optimizer"]["learning_rate"] == 0.001
    assert settings["optimizer"]["max_grad_norm"] is None
    assert settings["noise"]["groups"] is True
    assert settings["task_options"] == {"width": 3, "name": "a"}
    assert settings["run_dir"].startswith("runs/pysource-")
    assert num_replicas == 2


@pytest.mark.parametrize("form", [["--run_dir", "{}"], ["--run_dir={}"]])
def test_a_run_is_resumed_with_its_own_settings(tmp_path, start, form):
    """Only --run_dir and --resume need to be said again; what is said overrides what is saved."""
    (tmp_path / "config.yaml").write_text(f"seed: 9\nrun_dir: {tmp_path}\nlog: {{tracker: none}}\n")
    where = [part.format(tmp_path) for part in form]
    assert outcome(["train", *where, "--resume", "--log.every_steps", "5"])[0] == 0
    ((settings, resume, _),) = start
    assert resume
    assert (settings["seed"], settings["log"]["tracker"], settings["log"]["every_steps"]) == (9, "none", 5)


@pytest.mark.parametrize("earlier", [None, 4000])
@pytest.mark.parametrize(("tokens", "samples"), [*IN_SAMPLES.items(), ("max_steps", "max_samples")])
@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize("is_file", [False, True])
def test_a_later_setting_replaces_the_same_in_another_unit(tmp_path, tokens, samples, is_turned, is_file, earlier):
    """A run's own config.yaml has all settings in samples; tokens that are said later win over it, and the reverse."""
    before, after = (tokens, samples) if is_turned else (samples, tokens)
    schedule = "schedule" in before
    value = earlier and ("0:8 100:16" if schedule else earlier)
    law = {"law": "schedule" if schedule else "constant"}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({"control": law, before: value}))
    later = "0:16 200:32" if schedule else 5000
    arguments = ["--config", str(tmp_path / "first.yaml")]
    if is_file:
        (tmp_path / "later.yaml").write_text(yaml.safe_dump({after: later, before: None}))
        arguments += ["--config", str(tmp_path / "later.yaml")]
    else:
        arguments += [f"--{after}", str(later)]
    config, _ = settings_of.parse(arguments)
    found = attrgetter(before, after)(config)
    assert found == (None, later)


def test_a_length_in_steps_and_its_samples_stay_together(tmp_path):
    """A run's own config.yaml says both, and neither drops the other."""
    own = {"global_batch_size": 4, "max_steps": 3, "max_samples": 12, "control": {"law": "constant"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(own))
    config, _ = settings_of.parse(["--config", str(tmp_path / "config.yaml"), "--seed", "1"])
    assert (config.max_steps, config.max_samples) == (3, 12)


def test_print_config_is_a_settings_file(tmp_path, start):
    """What --print_config prints, --config reads; nothing is started by it."""
    code, stdout, _ = outcome(["train", "--seed", "5", "--control.law", "constant", "--print_config"])
    assert code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(stdout)
    config, options = settings_of.parse(["--config", str(path)])
    assert config == settings_of.parse(["--seed", "5", "--control.law", "constant"])[0]
    assert config != TrainConfig()
    assert (options.replicas, options.resume) == (None, False)
    assert start == []


def test_print_config_refuses_a_task_that_does_not_exist(start):
    """And options that its function does not take: what is printed can be trained."""
    for wrong, part in ((["--task", "digit"], "did you mean 'digits'?"), (["--task-options.wdth", "3"], "'wdth'")):
        code, stdout, stderr = outcome(["train", *wrong, "--print-config"])
        assert (code, stdout) == (2, "")
        assert_one_sentence(stderr, part)
    assert start == []


# Refused by the replicas, before a step is made

TASKS = """
import dataclasses, torch
from torch import nn
from torch.utils.data import TensorDataset
from dptrain.tasks import Suggestion, Task

def good(num_samples=64):
    return Task(
        name="good", model=nn.Linear(2, 1), train_data=TensorDataset(torch.ones(num_samples, 2)),
        loss=lambda model, batch: model(batch[0]).mean(),
        suggestion=Suggestion(
            learning_rate=0.1, global_batch_size=4, micro_batch_size=2, max_samples=24, eval_every_samples=8
        ),
    )

def no_graph():
    return dataclasses.replace(good(), loss=lambda model, batch: model(batch[0]).mean().detach())

def no_task():
    return 3

def fails():
    raise KeyError("data")
"""

RUN = "--device cpu --log.tracker none --run_dir"
REFUSED = [
    (f"--task tasks.py:good --task_options.num_samples 1 {RUN} a", 2, ["at least 2 samples, got 1"]),
    (f"--task tasks.py:no_graph {RUN} a", 2, ["returned no graph"]),
    (f"--task tasks.py:no_task {RUN} a", 2, ["must return a dptrain.tasks.Task, got int"]),
    (f"--task tasks.py:fails {RUN} a", 2, ["could not be built", "KeyError"]),
    (f"--task tasks.py:god {RUN} a", 2, ["has no function 'god', did you mean 'good'?"]),
    (f"--task nowhere.py:good {RUN} a", 2, ["no task file"]),
    (f"--task broken.py:good {RUN} a", 2, ["does not import", "ModuleNotFoundError", "broken.py, line 1"]),
    (f"--task digit {RUN} a", 2, ["unknown task 'digit', did you mean 'digits'?"]),
    (f"--task quadratic --task_options.size 3 {RUN} a", 2, ["has no option 'size'", "num_samples"]),
    (f"--task quadratic --global_batch_size 12 --micro_batch_size 5 {RUN} a", 2, ["multiple of 5, such as 10 or 15"]),
    (f"--task quadratic --control.largest 1 {RUN} a", 2, ["control.smallest 4 is above control.largest 1"]),
    (f"--task quadratic --optimizer.warmup_samples 99999 {RUN} a", 2, ["warmup_samples 99999"]),
    (f"--task quadratic --noise.observer hook {RUN} a", 2, ["at least two replicas"]),
    (f"--task quadratic {RUN} tasks.py", 2, ["tasks.py is a file"]),
    (f"--task quadratic {RUN} tasks.py/below", 2, ["cannot write to run folder"]),
    (f"--task quadratic {RUN} /proc/dptrain", 2, ["cannot write to run folder"]),
    (f"--task quadratic --resume {RUN} a", 2, ["no run to resume in a"]),
    (f"--task quadratic {RUN} done", 2, ["done already holds a run", "--resume"]),
    (f"--seed 5 --resume {RUN} done", 2, ["other settings", "seed was 0 and is 5"]),
    (f"--optimizer.beta1 0.5 --resume {RUN} done", 2, ["optimizer.beta1 was 0.9 and is 0.5"]),
    (f"--task_options.num_samples 32 --resume {RUN} done", 2, ["task_options.num_samples was"]),
    (f"--resume {RUN} bare", 2, ["bare/config.yaml is missing", "--task"]),
    (f"--resume {RUN} used", 2, ["used is in use", "or choose another --run-dir"]),
    (f"--resume {RUN} damaged", 74, ["no checkpoint", "can be trusted"]),
]


def refuse_all(rank, world_size, folder):
    """Run every case as the only replica; return its outcome, and whether it left the runs that exist alone."""
    from filelock import FileLock

    os.chdir(folder)
    Path("tasks.py").write_text(TASKS)
    Path("broken.py").write_text("import nothing_of_this_name\n")
    # The group of the test stays, for the next case to use.
    with mock.patch("torch.distributed.destroy_process_group"):
        for name in ("done", "used", "damaged"):
            assert outcome(f"train --task tasks.py:good --checkpoint.every_samples 8 {RUN} {name}".split())[0] == 0
        for path in Path("damaged").glob("checkpoints/*/model.safetensors"):
            path.write_bytes(b"")
        shutil.copytree("done", "bare")
        Path("bare/config.yaml").unlink()
        before = contents("done", "damaged")
        with FileLock("used/.lock"):
            outcomes = [outcome(["train", *arguments.split()]) for arguments, _, _ in REFUSED]
        unchanged = contents("done", "damaged") == before
        resumed = outcome(f"train --resume {RUN} done".split())
    return outcomes, unchanged, resumed, Path("a").exists()


def contents(*folders):
    return {path: path.read_bytes() for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return run_replicas(refuse_all, world_size=1, args=(tmp_path_factory.mktemp("refused"),))[0]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_a_run_that_cannot_be_is_refused_in_one_sentence(refused, case):
    """With the reason and, where there is one, the remedy; nothing is trained."""
    _, code, parts = REFUSED[case]
    found, stdout, stderr = refused[0][case]
    assert_one_sentence(stderr, *parts)
    assert (found, stdout) == (code, "")


def test_a_refusal_leaves_nothing_and_changes_nothing(refused):
    """No folder is made, and a run that was not resumed for its settings can be resumed with its own."""
    _, unchanged, (code, _, stderr), left = refused
    assert unchanged
    assert not left
    assert code == 0, stderr


# The whole way, in processes of their own


def run(arguments, *, cwd):
    return subprocess.run(
        [sys.executable, *arguments.split()],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_several_replicas_say_it_once(tmp_path):
    """What each of them finds, and what rank 0 alone finds: one sentence, no traceback, no table of a launcher."""
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "metrics.jsonl").touch()
    every = run(f"-m dptrain train --task broken.py:f --replicas 2 {RUN} a", cwd=tmp_path)
    one = run(f"-m dptrain train --task quadratic --replicas 2 {RUN} held", cwd=tmp_path)
    for found, part in ((every, "does not import"), (one, "already holds a run")):
        assert found.returncode == 2, found.stderr
        assert_one_sentence(found.stderr, part)
        assert found.stdout.startswith("run ")
        assert found.stdout.endswith(" | starting …\n")
        assert found.stdout.count("\n") == 1
    assert [path.name for path in (tmp_path / "held").iterdir()] == ["metrics.jsonl"]


def test_the_first_line_waits_for_nothing_slow(tmp_path):
    """Run folder, task, replicas, device, precision and tracker are printed before torch is loaded."""
    program = """
import sys
from dptrain.cli import train
train.start_replicas = lambda *_, **__: print("torch" in sys.modules)
train.train(sys.argv[1:])
"""
    arguments = [
        "--task",
        "digits",
        "--device",
        "cpu",
        "--run-dir",
        "a",
        "--precision",
        "bf16",
        "--log.tracker",
        "none",
    ]
    found = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    line = "run a | task digits | 2 cpu replicas | precision bf16 | tracker none | starting …"
    assert found.stdout.splitlines() == [line, "False"]


def test_torchrun_starts_it_too(tmp_path):
    """`torchrun … -m dptrain train` trains, ends with 0, and leaves a whole run folder."""
    (tmp_path / "tasks.py").write_text(TASKS)
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    found = run(f"{launcher} -m dptrain train --task tasks.py:good {RUN} run", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "decisions.jsonl", "summary.json", "report.png", "checkpoints"} <= names
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["samples_seen"], summary["backend"]) == (2, 24, "gloo")
    assert "after 24 samples in 6 steps" in found.stdout
    assert found.stdout.count("report: ") == 1


def test_the_code_of_a_silent_replica_waits(monkeypatch):
    """A replica other than the first gives rank 0 time to speak, and speaks if it is still there afterwards."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(command, "_PATIENCE_S", 0.0)
    code, _, stderr = outcome(["train", "--replicas", "2"])
    assert code == 2
    assert_one_sentence(stderr)
