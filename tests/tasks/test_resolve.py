"""Finding a task: what a user may write, and the sentence that each mistake gets."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import signal
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dptrain.errors import ConfigError, TaskError
from dptrain.tasks import BUILT_IN, check_task, resolve, resolve_task
from tests.tasks.made_tasks import small_task

NEED_DATA = ("pictures", "gpt", "huggingface", "images")
PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"

TASK_FILE = """
import torch
from torch import nn
from torch.utils.data import Dataset
from dptrain.tasks import Suggestion, Task

class Points(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.full((2,), float(index))

def loss(model, batch):
    return model(batch).square().mean()

def build(*, width=1):
    return Task(name="points", model=nn.Linear(2, width), train_data=Points(), loss=loss,
        suggestion=Suggestion(learning_rate=0.1, global_batch_size=4, micro_batch_size=2,
                              max_samples=100, eval_every_samples=50))
"""


@pytest.fixture(autouse=True)
def _imports_restored():
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    resolve._folders.clear()
    for name in set(sys.modules) - modules:
        if not name.startswith(("dptrain", "sklearn", "scipy", "numpy", "torch")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    def write_file(text=TASK_FILE, *, name="its_task.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in NEED_DATA])
def test_built_in_tasks_are_found_and_pass_the_check(name):
    """Each built-in name gives a task that can be trained and evaluated."""
    task = resolve_task(name)
    check_task(task)
    assert len(task.eval_data) >= 1


def test_file_is_found(write):
    """`file.py:function` gives what the function returns, with the options given."""
    task = resolve_task(f"{write()}:build", options={"width": 3})
    check_task(task)
    assert (task.name, task.model.out_features) == ("points", 3)


def test_callable_is_called():
    """A Python function is as good as a name."""
    made = small_task()
    assert resolve_task(lambda: made) is made


def test_file_may_import_its_neighbours(write):
    """A task file imports files beside it, while it loads and later, when its function runs."""
    write("WIDTH = 5", name="neighbour_early.py")
    write("EXTRA = 2", name="neighbour_late.py")
    path = write(
        "from neighbour_early import WIDTH\n"
        + TASK_FILE
        + "\ndef wide():\n    from neighbour_late import EXTRA\n    return build(width=WIDTH + EXTRA)\n"
    )
    assert resolve_task(f"{path}:wide").model.out_features == 7


def test_imports_of_others_keep_their_meaning(write):
    """A file beside the task that is named like an installed module does not take its place."""
    write("raise RuntimeError('the wrong one')", name="colorsys.py")
    resolve_task(f"{write()}:build")
    sys.modules.pop("colorsys", None)
    import colorsys

    assert hasattr(colorsys, "rgb_to_hsv")


def test_file_is_imported_once(write):
    """Resolving a file twice gives tasks of the same classes."""
    spec = f"{write()}:build"
    assert type(resolve_task(spec).train_data) is type(resolve_task(spec).train_data)


def test_later_file_of_the_same_name_takes_the_place(write):
    """Two task files of one name in two folders can be used one after the other, each with its own content."""
    first = write(TASK_FILE.replace('"points"', '"first"'), name="one/task_of_mine.py")
    second = write(TASK_FILE.replace('"points"', '"second"'), name="two/task_of_mine.py")
    names = [resolve_task(f"{path}:build").name for path in (first, second, first)]
    assert names == ["first", "second", "first"]
    assert [folder for folder in sys.path if folder.endswith(("/one", "/two"))] == [str(first.parent)]


def test_spawned_workers_find_the_classes(write):
    """A DataLoader whose workers are started afresh yields the samples of a dataset that a task file defines."""
    task = resolve_task(f"{write()}:build")
    loader = DataLoader(
        task.train_data, batch_size=4, num_workers=1, multiprocessing_context=multiprocessing.get_context("spawn")
    )
    assert [batch[:, 0].tolist() for batch in loader] == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("pysorce", "unknown task 'pysorce', did you mean 'pysource'"),
        ("zebra", "unknown task 'zebra'; built in are pysource, digits, mnist1d, gpt, "),
        ("my_task.py", "write my_task.py:FUNCTION"),
        ("nowhere/my_task.py:build", "no task file .*nowhere/my_task.py"),
        (":build", "no task file"),
    ],
)
def test_unknown_spec_is_refused(spec, sentence):
    """A spec that names nothing says what is near, or how one is written."""
    with pytest.raises(ConfigError, match=sentence):
        resolve_task(spec)


def test_missing_function_is_refused(write):
    """A function that the file lacks gets the nearest name."""
    with pytest.raises(ConfigError, match=r"its_task.py has no function 'biuld', did you mean 'build'\?"):
        resolve_task(f"{write()}:biuld")


@pytest.mark.parametrize("name", ["random.py", "json.py", "torch.py", "colorsys.py"])
def test_file_named_like_a_module_is_refused(write, name):
    """A task file that would hide another module is refused with the module's place."""
    with pytest.raises(ConfigError, match="has the name of another module"):
        resolve_task(f"{write(name=name)}:build")


def test_file_with_a_dot_in_its_name_is_refused(write):
    """A name that workers could not import is refused."""
    with pytest.raises(ConfigError, match=r"has a dot in its name"):
        resolve_task(f"{write(name='my.task.py')}:build")


@pytest.fixture
def no_interrupt():
    """As in the command, where SIGINT does not raise KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\n\nimport no_such_thing", r"ModuleNotFoundError: No module named 'no_such_thing' \(.*its_task.py, line 3\)"),
        ("x = 1\ny = (", r"does not import: SyntaxError: .*\(its_task.py, line 2\)"),
        ("import json\njson.loads('{')", r"JSONDecodeError: .*its_task.py, line 2\)"),
        ("import sys\nsys.exit(3)", r"does not import: SystemExit: 3 \(.*its_task.py, line 2\)"),
        ("\nraise KeyboardInterrupt", r"does not import: KeyboardInterrupt \(.*its_task.py, line 2\)"),
        ("import asyncio\nraise asyncio.CancelledError", r"does not import: CancelledError \(.*its_task.py, line 2\)"),
        ("class Odd(BaseException): pass\nraise Odd('x')", r"does not import: Odd: x \(.*its_task.py, line 2\)"),
    ],
)
@pytest.mark.usefixtures("no_interrupt")
def test_file_that_does_not_import_is_refused(write, text, sentence):
    """The sentence has the original type, message and the line in the user's file, and nothing of the file stays."""
    before = list(sys.path)
    with pytest.raises(TaskError, match=sentence) as caught:
        resolve_task(f"{write(text)}:build")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert sys.path == before
    assert "its_task" not in sys.modules


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) is not signal.default_int_handler, reason="SIGINT is ignored here")
def test_interrupt_of_a_person_passes(write):
    """Where Python turns Ctrl-C into KeyboardInterrupt, as in a notebook, it is no error of the task."""
    path = write("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    with pytest.raises(KeyboardInterrupt):
        resolve_task(f"{path}:build")


def test_function_that_raises_is_reported(write):
    """An exception of the user's function comes with its line."""
    path = write("def build():\n    return 1 / 0\n")
    with pytest.raises(TaskError, match=r"could not be built: ZeroDivisionError: .*its_task.py, line 2\)"):
        resolve_task(f"{path}:build")


def test_our_own_sentences_pass_as_they_are():
    """A ConfigError raised by a task's function is not wrapped into another."""
    with pytest.raises(ConfigError, match=r"^digits has the models"):
        resolve_task("digits", options={"model": "resnet"})


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("build", "options", "sentence"),
    [
        (lambda: None, {}, "must return a dptrain.tasks.Task, got NoneType"),
        (lambda: small_task(model=len), {}, "must be a torch.nn.Module, got builtin"),
        (lambda: small_task(loss=3), {}, "must be a function of"),
        (lambda: small_task(train_data=[1]), {}, "train_data of task 'small' must have at least 2 samples, got 1"),
        (lambda: small_task(eval_data=[]), {}, "eval_data of task 'small' must have at least 1 samples, got 0"),
        (lambda: small_task(train_data=iter([1, 2])), {}, "must be a map-style dataset"),
        (lambda: small_task(eval_data=Stream()), {}, "map-style .* got Stream"),
        (
            lambda: small_task(eval_data={"a": [1], "b": []}),
            {},
            r"eval_data\['b'\] of task 'small' must have at least 1",
        ),
        (
            lambda: small_task(train_data=Stream(), sample_weights=[1.0]),
            {},
            "an IterableDataset decides on its own order",
        ),
        (lambda: small_task(metrics={"f1": None}), {}, "has metrics, and no function `outputs`"),
        (lambda: small_task(train_data=torch.utils.data.Dataset()), {}, "has no length: TypeError"),
    ],
)
def test_unusable_task_is_refused(build, options, sentence):
    """What a function returns is looked at before anything runs."""
    with pytest.raises(TaskError, match=sentence):
        resolve_task(build, options=options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"widht": 8}, "no option 'widht', did you mean 'width'"),
        ({"zebra": 8}, "no option 'zebra'; its options are model, context, width, depth, heads"),
    ],
)
def test_unknown_option_is_refused(options, sentence):
    """An option that the function lacks gets the nearest one, or all."""
    with pytest.raises(ConfigError, match=sentence):
        resolve_task("pysource", options=options)


def test_missing_option_is_refused():
    """A function that needs an argument says which."""

    def build(*, width):
        return small_task(model=nn.Linear(2, width))

    with pytest.raises(ConfigError, match=r"missing a required.*width"):
        resolve_task(build)


def test_example_of_the_page_trains(write):
    """The example of docs/tasks.md resolves, passes the check, takes its option, and lowers its loss."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    task = resolve_task(f"{write(example, name='my_task.py')}:build", options={"width": 16})
    check_task(task)
    loader = DataLoader(task.train_data, batch_size=task.suggestion.global_batch_size)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=task.suggestion.learning_rate)
    losses = []
    for batch, _ in zip(loader, range(200), strict=False):
        loss = task.loss(task.model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


def test_sentences_of_the_page_are_true(write):
    """What docs/tasks.md says of a misspelt task, function and option, and of a wrong loss, is what a user gets."""
    page = PAGE.read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    spec = f"{write(example, name='my_task.py')}:build"
    task = resolve_task(spec)

    def unreduced(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1], reduction="none")

    mistakes = [
        lambda: resolve_task("pysorce"),
        lambda: resolve_task(spec.replace("build", "biuld")),
        lambda: resolve_task(spec, options={"widht": 3}),
        lambda: check_task(dataclasses.replace(task, loss=lambda *given: task.loss(*given).item())),
        lambda: check_task(dataclasses.replace(task, loss=unreduced)),
        lambda: check_task(dataclasses.replace(task, loss=lambda *given: task.loss(*given).detach())),
    ]
    for mistake in mistakes:
        with pytest.raises((ConfigError, TaskError)) as caught:
            mistake()
        sentence = str(caught.value).replace(spec.removesuffix("my_task.py:build"), "")
        sentence = sentence.split("; built in")[0]
        assert sentence in page


@pytest.mark.parametrize("name", ["digits", "patches"])
def test_a_built_in_task_that_lacks_a_package_names_the_extra(monkeypatch, name):
    """One sentence with what to install, in place of Python's."""
    for module in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ConfigError, match=rf"task '{name}' needs the package scikit-learn.*dptrain\[tasks\]"):
        resolve_task(name)


def test_a_task_of_ones_own_may_lack_anything(tmp_path):
    """What it imports is its own affair: Python's words, and the line."""
    path = tmp_path / "lacking_task.py"
    path.write_text("def build():\n    raise ModuleNotFoundError('No module named sklearn', name='sklearn')\n")
    with pytest.raises(TaskError, match=r"could not be built: ModuleNotFoundError: .*lacking_task.py, line 2\)"):
        resolve_task(f"{path}:build")
