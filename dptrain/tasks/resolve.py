"""From what a user writes (a name, `file.py:function` or a callable) to a checked task; no problem lives here."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from dptrain.errors import ConfigError, TaskError
from dptrain.tasks.base import Task
from dptrain.tasks.check import check_parts, refuse_coroutine, reported
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
        ConfigError: where `spec` or an option does not exist, or a built-in task needs a package that is not installed.
        TaskError: where the file does not import, or the function raises, or what it returns cannot be trained.
    """
    build, name = (spec, getattr(spec, "__name__", repr(spec))) if callable(spec) else (_find(spec), spec)
    options = {} if options is None else options
    _check_options(build, name=name, options=options)
    with reported(f"task {name!r} could not be built"):
        try:
            task = build(**options)
        except ImportError as error:
            _name_extra(error, build=build, name=name)
            raise
    refuse_coroutine(task, f"what task {name!r} returns")
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r} must return a dptrain.tasks.Task, got {type(task).__name__}")
    check_parts(task)
    return task


_BROUGHT = {"sklearn": "scikit-learn", "PIL": "pillow"} | {
    name: name for name in ("datasets", "pyarrow", "tokenizers", "torchmetrics", "transformers")
}
"""Modules of the extra `tasks`, by the names of their packages."""


def _name_extra(error: ImportError, *, build: Callable[..., Task], name: str) -> None:
    """Say which extra brings what a built-in task lacks; a task of the user's own may import anything."""
    package = _BROUGHT.get((error.name or "").partition(".")[0])
    if package is not None and build in BUILT_IN.values():
        needs = f"needs the package {package}, which is not installed: pip install 'dptrain[tasks]'"
        raise ConfigError(f"task {name!r} {needs}") from error


def check_task_name(spec: str, *, options: Mapping[str, Any]) -> None:
    """Refuse a task that does not exist, or that does not take the options; a built-in one is not built for it.

    Raises:
        ConfigError: where `spec` or an option does not exist.
        TaskError: where the file does not import.
    """
    _check_options(_find(spec), name=spec, options=options)


def load_object(spec: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Return what `file.py:name`, `package.module:name` or `package.module.name` stands for.

    Raises:
        ConfigError: where it does not exist.
        TaskError: where its module does not import.
    """
    path, colon, name = spec.rpartition(":")
    if colon and path.endswith(".py"):
        return _function_in(_import_file(_resolved(path)), name)
    module, _, name = spec.replace(":", ".").rpartition(".")
    with reported(f"module {module!r} does not import"):
        found = importlib.import_module(module)
    if not hasattr(found, name):
        raise ConfigError(f"module {module!r} has no {name!r}{_nearest(name, vars(found))}")
    return getattr(found, name)


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


def _nearest(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name, list(names), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
