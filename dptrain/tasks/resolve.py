"""From what a user writes (a name, `file.py:function` or a callable) to a checked task; no problem lives here."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import random
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

from dptrain.errors import ConfigError, DptrainError, TaskError
from dptrain.tasks.base import Task
from dptrain.tasks.digits import digits
from dptrain.tasks.gpt import gpt
from dptrain.tasks.huggingface import huggingface
from dptrain.tasks.images import images
from dptrain.tasks.known import linear, quadratic
from dptrain.tasks.mnist1d import mnist1d
from dptrain.tasks.patches import patches
from dptrain.tasks.pictures import pictures
from dptrain.tasks.pysource import pysource

BUILT_IN: Mapping[str, Callable[..., Task]] = {
    "pysource": pysource,
    "digits": digits,
    "mnist1d": mnist1d,
    "gpt": gpt,
    "huggingface": huggingface,
    "images": images,
    "patches": patches,
    "pictures": pictures,
    "quadratic": quadratic,
    "linear": linear,
}
"""The tasks that come with dptrain, by name."""

_NUM_CHECKED_SAMPLES = 2


def resolve_task(spec: str | Callable[..., Task], *, options: Mapping[str, Any] | None = None) -> Task:
    """Build the task that `spec` names, with what can be seen of it without running it checked.

    The file of `path/to/file.py:function` is imported as the module of its name, and its folder joins the **end** of
    `sys.path`: it may import files beside it, no import of anybody else changes its meaning, and the workers of a
    DataLoader find its classes however they are started. The price is that its name must not be that of another
    module. A task file of the same name from another folder takes the place of an earlier one.

    Args:
        spec: the name of a built-in task, `path/to/file.py:function`, or a callable that returns a task.
        options: keyword arguments of that function.

    Raises:
        ConfigError: where `spec` or an option does not exist.
        TaskError: where the file does not import, or the function raises, or what it returns cannot be trained.
    """
    build, name = (spec, getattr(spec, "__name__", repr(spec))) if callable(spec) else (_find(spec), spec)
    options = {} if options is None else options
    _check_options(build, name=name, options=options)
    with reported(f"task {name!r} could not be built"):
        task = build(**options)
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r} must return a dptrain.tasks.Task, got {type(task).__name__}")
    _check_parts(task)
    return task


def check_task_name(spec: str, *, options: Mapping[str, Any]) -> None:
    """Refuse a task that does not exist, or that does not take the options; a built-in one is not built for it.

    Raises:
        ConfigError: where `spec` or an option does not exist.
        TaskError: where the file does not import.
    """
    _check_options(_find(spec), name=spec, options=options)


def check_task(task: Task) -> None:
    """Run two training samples through a copy of the model, on the CPU in train mode, and look at the loss.

    The task stays as it was: parameters, gradients, buffers, modes, and the random states of torch and of `random`.
    The value need not be finite. Because the loss sees a copy, a loss that uses a model of its own instead of the one
    that it is given is found out too: under data parallelism nobody would reduce its gradients.

    Raises:
        TaskError: where a sample, the collation, or the loss raises; or where the loss is not a floating-point scalar
            with a graph that reaches a parameter of the model.
    """
    with random_state_kept(), torch.enable_grad():
        samples = [_sample(task.train_data, index, name=task.name) for index in range(_NUM_CHECKED_SAMPLES)]
        with reported(f"the first two training samples of task {task.name!r} do not make a micro-batch"):
            batch = (task.collate or default_collate)(samples)
        with reported(f"the model of task {task.name!r} cannot be copied"):
            model = copy.deepcopy(task.model).train()
        with reported(f"the loss of task {task.name!r} does not run on a micro-batch of two samples"):
            loss = task.loss(model, batch)
        _check_loss(loss, model=model, name=task.name)


def _find(spec: str) -> Callable[..., Task]:
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    path, colon, function = spec.rpartition(":")
    if colon:
        return _function_in(_import_file(_resolved(path)), function)
    hint = f", write {spec}:FUNCTION" if spec.endswith(".py") else _nearest(spec, BUILT_IN)
    raise ConfigError(
        f"unknown task {spec!r}{hint}; built in are {', '.join(BUILT_IN)}, your own is path/to/file.py:function"
    )


def _resolved(path: str) -> Path:
    try:
        resolved = Path(path).expanduser().resolve()
        is_task_file = resolved.suffix == ".py" and resolved.is_file()
    except (OSError, ValueError, RuntimeError):  # no name that a file can have; no home
        resolved, is_task_file = Path(path), False
    if not is_task_file:
        raise ConfigError(f"no task file {resolved}; write path/to/file.py:function, as seen from {Path.cwd()}")
    return resolved


def _function_in(module: ModuleType, name: str) -> Callable[..., Task]:
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(f"{module.__file__} has no function {name!r}{_nearest(name, names)}")
    return function  # type: ignore[no-any-return] # what it returns is checked when it is called


def _import_file(path: Path) -> ModuleType:
    loaded = sys.modules.get(path.stem)
    if loaded is not None and _is_file(getattr(loaded, "__file__", None), path):
        return loaded
    _free_name(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    _folders[path.stem] = str(path.parent)
    sys.path.append(str(path.parent))
    try:
        with reported(f"task file {path} does not import"):
            spec.loader.exec_module(module)
    except BaseException:
        _forget(path.stem)
        raise
    return module


_folders: dict[str, str] = {}
"""Of each task file that was imported here: its module name, and its folder, which stands in sys.path because of it."""


def _free_name(path: Path) -> None:
    """Make the name of `path` free where an earlier task file has it; refuse where anybody else has."""
    name = path.stem
    if "." in name:
        raise ConfigError(f"task file {path} has a dot in its name, which no module can have; rename it")
    if name in _folders:
        _forget(name)
    owner = _owner(name)
    if owner is not None and not _is_file(owner, path):
        raise ConfigError(f"task file {path} has the name of another module, {owner}; rename it")


def _owner(name: str) -> str | None:
    """The file that `import name` means at present; None where that would fail or find a mere folder."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__file__", None) or f"built-in {name}"
    found = importlib.util.find_spec(name)
    return found.origin if found else None


def _forget(name: str) -> None:
    del sys.modules[name]
    # Last of its kind: an equal entry before it was somebody else's.
    last = len(sys.path) - 1 - sys.path[::-1].index(_folders.pop(name))
    del sys.path[last]


def _is_file(name: str | None, path: Path) -> bool:
    return name is not None and Path(name).resolve() == path


def _check_options(build: Callable[..., Task], *, name: str, options: Mapping[str, Any]) -> None:
    signature = inspect.signature(build)
    odd = next((key for key in options if not isinstance(key, str)), None)
    if odd is not None:
        raise ConfigError(f"the options of task {name!r} must have names that are text, got {odd!r}")
    try:
        signature.bind(**options)
    except TypeError as error:
        names = [p.name for p in signature.parameters.values() if p.kind in _BY_KEYWORD]
        unknown = next((key for key in options if key not in names), None)
        if unknown is None:
            # Names alone: a value may be long, or nobody's business.
            given = f"the options {', '.join(options)}" if options else "no options"
            raise ConfigError(f"task {name!r} cannot be built with {given}: {error}") from None
        its_options = f"its options are {', '.join(names)}" if names else "it has none"
        raise ConfigError(f"task {name!r} has no option {unknown!r}{_nearest(unknown, names)}; {its_options}") from None


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _check_parts(task: Task) -> None:
    if not isinstance(task.model, nn.Module):
        raise TaskError(f"the model of task {task.name!r} must be a torch.nn.Module, got {type(task.model).__name__}")
    if not callable(task.loss):
        raise TaskError(f"the loss of task {task.name!r} must be a function of (model, micro-batch), got {task.loss!r}")
    _check_data(task.train_data, f"train_data of task {task.name!r}", at_least=_NUM_CHECKED_SAMPLES)
    if task.eval_data is not None:
        _check_data(task.eval_data, f"eval_data of task {task.name!r}", at_least=1)


def _check_data(data: Any, what: str, *, at_least: int) -> None:  # noqa: ANN401 - whatever a user gave
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise TaskError(
            f"{what} must be a map-style dataset, with __getitem__ and __len__, because the trainer decides the order "
            f"of samples; got {type(data).__name__}"
        )
    with reported(f"{what} has no length"):
        length = len(data)
    if length < at_least:
        raise TaskError(f"{what} must have at least {at_least} samples, got {length}")


def _sample(data: Any, index: int, *, name: str) -> Any:  # noqa: ANN401 - whatever a user gave
    with reported(f"sample {index} of the training data of task {name!r} cannot be read"):
        return data[index]


def _check_loss(loss: Any, *, model: nn.Module, name: str) -> None:  # noqa: ANN401 - whatever a user's loss returned
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise TaskError(f"the model of task {name!r} has no parameter that requires a gradient")
    if not isinstance(loss, Tensor):
        raise TaskError(f"the loss of task {name!r} must return a scalar tensor, got {type(loss).__name__}")
    if loss.shape != () or not loss.is_floating_point():
        raise TaskError(
            f"the loss of task {name!r} must return one floating-point number, the mean over the micro-batch's "
            f"samples, got shape {tuple(loss.shape)} of {loss.dtype}"
        )
    if loss.device != parameters[0].device:
        raise TaskError(
            f"the loss of task {name!r} is on device {loss.device}, and its model on {parameters[0].device}: "
            "put what the loss makes itself where the micro-batch is"
        )
    if not loss.requires_grad:
        raise TaskError(f"the loss of task {name!r} returned no graph: is there a .detach(), .item() or no_grad in it?")
    with reported(f"the loss of task {name!r} cannot be differentiated"):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise TaskError(
            f"the loss of task {name!r} reaches no parameter of the model that it is given: does it use another one?"
        )


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random states of torch and of `random` as they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Make one sentence of what a user's code raises, sys.exit included; our own errors are sentences already."""
    try:
        yield
    except DptrainError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{what}: {_description(error)}") from error


def _description(error: BaseException) -> str:
    """Type, message, and the innermost line of it that is neither dptrain's nor installed: most likely the user's."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if isinstance(error, SyntaxError):
        return text  # it names its file and line itself; the traceback ends where the import began
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_OF_THE_USER)]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


_NOT_OF_THE_USER = (
    "<",
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
