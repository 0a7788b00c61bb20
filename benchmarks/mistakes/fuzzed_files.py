"""Settings and task files as careless people write them, by the hundreds; each is tried by the command itself."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from dptrain.cli.main import main
from dptrain.config.settings_file import setting_names

SOUND = """\
task: {task}
device: cpu
seed: 1
max_samples: 24
global_batch_size: 4
micro_batch_size: 2
log: {{tracker: none, eval_every_samples: 24}}
"""
ODD_VALUES = [
    "0", "-1", "1e3", "1e400", ".nan", ".inf", "null", "~", "true", "no", "''", "' '", "x", "[1]", "{a: 1}", "1" * 80, "0x10", "1_0",
    "1.5", "-0.0", "2.0", "99999999999", "5e-324", "1:30", "2026-01-01", "auto", "'16'", "3 samples", "\\u0000", "\t", "&a 1", "*a", "!!int 3",
    "1e-3", "0.5", "2", "7", "64", "1.0", "0.999999", "1k", "€", "[[]]", "- 1", "sgd", "adamw", "constant", "cosine", "noise", "schedule", "0:4,12:8",
]  # fmt: skip
TASK = """\
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from dptrain.tasks import Suggestion, Task

DATA = TensorDataset(torch.arange(64.0).reshape(64, 1) / 64, torch.arange(64.0).reshape(64, 1) / 64)

def loss(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()

def build():
    return Task(
        name="line", model=nn.Linear(1, 1), train_data=DATA, eval_data=DATA, loss=loss,
        suggestion=Suggestion(
            learning_rate=0.1, global_batch_size=4, micro_batch_size=2, max_samples=24, eval_every_samples=24
        ),
    )
"""
TASK_EDITS = [
    ("nn.Linear(1, 1)", ["None", "nn.Linear(2, 1)", "nn.Identity()", "nn.Linear", "nn.Linear(1, 2)", "torch.zeros(1)", "nn.Sequential()",
        "nn.Linear(1, 1).half()", "nn.Linear(1, 1).double()", "nn.Linear(1, 1).requires_grad_(False)", "nn.Linear(1, 0)", "nn.BatchNorm1d(1)"]),
    ("train_data=DATA", ["train_data=None", "train_data=[]", "train_data=DATA[0]", "train_data=range(9)", "train_data=iter(DATA)",
        "train_data={}", "train_data='data'", "train_data=TensorDataset(torch.ones(1, 1), torch.ones(1, 1))", "train_data=[(1, 2)] * 9",
        "train_data=[None] * 9", "train_data=list(DATA)"]),
    ("eval_data=DATA", ["eval_data=None", "eval_data=[]", "eval_data=3", "eval_data=[1]", "eval_data=list(DATA)[:3]"]),
    ("loss=loss", ["loss=None", "loss=3", "loss=nn.MSELoss()", "loss=lambda model: 0", "loss=lambda model, batch: None",
        "loss=lambda model, batch: 0.5", "loss=lambda model, batch: model(batch[0])", "loss=lambda m, b: loss(m, b).detach()",
        "loss=lambda m, b: loss(m, b).item()", "loss=lambda m, b: (loss(m, b), 1)", "loss=lambda m, b: m(b).mean()", "loss=lambda m, b: 1 / 0",
        "loss=lambda m, b: torch.tensor(1.0)", "loss=lambda m, b: loss(m, b).long()", "loss=lambda m, b: loss(m, b) * float('nan')",
        "loss=lambda m, b: exit()", "loss=lambda m, b: loss(m, b).reshape(1)"]),
    ("learning_rate=0.1", ["learning_rate=0", "learning_rate=-1", "learning_rate='0.1'", "learning_rate=None", "learning_rate=float('nan')",
        "learning_rate=1e30", "learning_rate=1"]),
    ("global_batch_size=4", ["global_batch_size=0", "global_batch_size=4.0", "global_batch_size=None", "global_batch_size=3",
        "global_batch_size='4'", "global_batch_size=10**30", "global_batch_size=1"]),
    ("micro_batch_size=2", ["micro_batch_size=0", "micro_batch_size=-2", "micro_batch_size=None", "micro_batch_size=5", "micro_batch_size=True"]),
    ("max_samples=24", ["max_samples=0", "max_samples=None", "max_samples=1", "max_samples=-5", "max_samples=2.5", "max_samples=5"]),
    ("eval_every_samples=24", ["eval_every_samples=0", "eval_every_samples=None", "eval_every_samples=-1", "eval_every_samples=1.5"]),
    ('name="line"', ["name=''", "name=None", "name=3", "name='a/b'", "name='\\x1b[2J'", "name='n' * 5000"]),
    ("def build():", ["def built():", "def build(x):", "def build(*, size):", "async def build():", "class build:", "def build()", "def build():\n    raise ValueError('\\n\\n')\n"]),
    ("    return Task(", ["    return (", "    return dict(", "    yield Task(", "    import sys; sys.exit(0)\n    return Task(", "    raise KeyboardInterrupt\n    return Task(",
        "    Task(", "    return Task(collate=lambda samples: None, ", "    return Task(collate=3, ", "    return Task(eval_metrics={'x': 3}, ", "    return Task(unknown=1, "]),
    ("import torch\n", ["import torsch\n", "", "import torch  \x00\n", "import torch\nraise SystemExit\n", "import torch\n\tx = 1\n", "# -*- coding: nonsense -*-\nimport torch\n"]),
]  # fmt: skip


_MANY_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One file, and what the command made of it.

    Attributes:
        kind: "settings", "task", or "harmless" for settings that look odd and are sound.
        accepted: whether the command ran it to its end.
        wrong: what was wrong with the ending; empty where nothing was.
        content: of the file.
        reported: the end of standard error.
    """

    kind: str
    accepted: bool
    wrong: str
    content: str
    reported: str


def harmless_settings(draw: random.Random) -> str:
    """Settings that look odd and are sound: lines in another order, comments, blank ends, quoted names, a default written out."""
    lines = [*SOUND.format(task="quadratic").splitlines(), "exchange.kind: all_reduce"]
    draw.shuffle(lines)
    lines.insert(draw.randint(0, len(lines)), draw.choice(["# seed: 2", "", "   # ]", "'log.every_steps': 1"]))
    return "\n".join(line + draw.choice(["", "  ", " # :"]) for line in lines) + draw.choice(["", "\n", "\n\n"])


def fuzzed_settings(draw: random.Random) -> str:
    """Settings with one or two lines that somebody mistyped."""
    lines = SOUND.format(
        task=draw.choice(["quadratic", "quadratic", "quadratic", "task.py:build", "digit"])
    ).splitlines()
    for _ in range(draw.randint(1, 2)):
        kind = draw.random()
        name = draw.choice(setting_names())
        if kind < 0.6:
            key = (
                name
                if draw.random() < 0.9
                else name[: draw.randint(0, len(name))] + draw.choice(["", "x", ".", "_", "é"])
            )
            lines.append(f"{key}: {draw.choice(ODD_VALUES)}")
        elif kind < 0.8:
            number = draw.randrange(len(lines))
            place = draw.randint(0, len(lines[number]))
            lines[number] = (
                lines[number][:place]
                + draw.choice(["", ":", " ", "\t", "{", "]", "'", "#", "\x00", "0"])
                + lines[number][place + draw.randint(0, 2) :]
            )
        else:
            lines.insert(
                draw.randint(0, len(lines)),
                draw.choice([*lines, "---", "? x", "- 1", "seed: 2", "%YAML 3", "control:", "  ratio: 2"]),
            )
    return "\n".join(lines) + "\n"


def fuzzed_task(draw: random.Random) -> str:
    """A task file with one or two wrong parts."""
    text = TASK
    for old, new in draw.sample(TASK_EDITS, draw.randint(1, 2)):
        text = text.replace(old, draw.choice(new), 1)
    return text


def outcome(arguments: list[str]) -> tuple[int | str, str]:
    """Run the command in this process; return exit code, or the error that came out, and standard error."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            code: int | str = main(arguments)
        except SystemExit as ended:
            code = ended.code if ended.code is not None else 0
        except BaseException as error:  # noqa: BLE001 - that is what must not happen
            code = f"{type(error).__name__}: {error}"
    return code, stderr.getvalue()


def complaint(code: int | str, stderr: str, *, run: Path) -> str:
    """What is wrong with an ending; empty where it is a run that is whole, or a refusal in one sentence."""
    reported = [line for line in stderr.splitlines() if line.startswith("dptrain train:")]
    if code in (0, 75):  # 75: a length was mistyped, or lost, and the run was stopped
        left = "summary.json" if code == 0 else "checkpoints"
        return "" if (run / left).exists() else "accepted, and nothing came of it"
    if "Traceback" in stderr:
        return "a traceback"
    if code == 65 and len(reported) == 1:  # diverged: the settings can run, and lead nowhere
        return ""
    if code != 2:
        return f"exit code {code}"
    return "" if len(reported) == 1 and len(stderr.splitlines()) == 1 else f"{len(stderr.splitlines())} lines"


def try_files(folder: Path, *, number: int, seed: int, noted: Callable[[Trial], None] = lambda _: None) -> list[Trial]:
    """Try so many files, settings and tasks in turn.

    The command runs in this process, once per file, for a start of Python takes ten times as long as a refusal. So this
    is a process with the environment of a replica, and in a process group.

    Args:
        folder: for files and runs; a run is removed once it was looked at.
        number: of files.
        seed: decides what stands in them.
        noted: called with each trial.
    """
    draw = random.Random(seed)  # noqa: S311 - no secret
    trials: list[Trial] = []
    signal.signal(signal.SIGTERM, lambda *_: None)  # one that comes when a run has just ended must not end this process
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the command has it, where no Ctrl-C is a KeyboardInterrupt
    with contextlib.chdir(folder), mock.patch("torch.distributed.destroy_process_group"):
        (folder / "task.py").write_text(TASK, encoding="utf-8")
        for index in range(number):
            settings, run = folder / "run.yaml", folder / f"run{index}"
            kind = "task" if index % 2 else "harmless" if index % 20 == 0 else "settings"
            if kind == "task":
                content = fuzzed_task(draw)
                (folder / f"task{index}.py").write_text(content, encoding="utf-8")
                settings.write_text(_settings_of_task(f"task{index}.py:build"), encoding="utf-8")
            else:
                content = harmless_settings(draw) if kind == "harmless" else fuzzed_settings(draw)
                settings.write_text(content, encoding="utf-8")
            # A report takes ten times as long as such a run; one accepted file in ten has its own drawn.
            drawn = sum(trial.accepted for trial in trials) % 10 == 0
            no_report = contextlib.nullcontext() if drawn else mock.patch("dptrain.explain.draw_report")
            with no_report, _stopped_when_long(run):
                code, stderr = outcome(["train", "--config", str(settings), "--run_dir", str(run)])
            wrong = complaint(code, stderr, run=run)
            accepted = code in (0, 75)
            if kind == "harmless" and not accepted:
                wrong = "refused, and nothing is wrong with it"
            trial = Trial(kind=kind, accepted=accepted, wrong=wrong, content=content, reported=stderr[-1500:])
            trials.append(trial)
            noted(trial)
            shutil.rmtree(run, ignore_errors=True)
    return trials


@contextlib.contextmanager
def _stopped_when_long(run: Path) -> Iterator[None]:
    """Ask a run to stop, once it has logged many more steps than the files ask for: it runs, and that is all it has to do."""
    ended = threading.Event()

    def watch() -> None:
        log = run / "metrics.jsonl"
        while not ended.wait(0.5):
            if log.exists() and log.read_bytes().count(b"\n") > _MANY_STEPS:
                os.kill(os.getpid(), signal.SIGTERM)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def _settings_of_task(task: str) -> str:
    """Settings that leave the sizes to the task's suggestion, which is part of the file that is tried."""
    sizes = "max_samples: 24\nglobal_batch_size: 4\nmicro_batch_size: 2\n"
    return SOUND.format(task=task).replace(sizes, "")
