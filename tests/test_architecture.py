"""Import arrows, what pure rooms may not see, and how large files and folders may be, held by reading every file."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dptrain"
ROOMS_ROUND_IT = ("benchmarks", "tests", "examples", "launch", "docs")

BOTTOM = {"errors", "error_text", "version", "ranges"}
PURE_FLOOR = BOTTOM | {"batch", "noise"}
MIDDLE = PURE_FLOOR | {"control", "observe", "exchange", "data", "models", "tasks"}
SERVICES = {"config", "checkpoint", "tracking", "cost", "runtime"}

MAY_IMPORT = {
    "errors": set(),
    "error_text": set(),
    "version": set(),
    "ranges": set(),
    "batch": BOTTOM,
    "noise": BOTTOM | {"batch"},
    "data": BOTTOM | {"batch"},
    "control": PURE_FLOOR,
    "observe": PURE_FLOOR,
    "exchange": PURE_FLOOR | {"observe"},
    "models": BOTTOM,
    "tasks": BOTTOM | {"batch", "models", "data"},
    # The services stand on each other in this order, from the settings up.
    "checkpoint": MIDDLE,
    "config": MIDDLE | {"checkpoint"},
    "tracking": MIDDLE | {"config", "checkpoint"},
    "cost": MIDDLE | {"config", "checkpoint", "tracking"},
    "runtime": MIDDLE | SERVICES - {"runtime"},
    "integrations": MIDDLE | SERVICES,
    "train": MIDDLE | SERVICES,
    "explain": MIDDLE | SERVICES,
    "sweep": MIDDLE | SERVICES | {"explain", "train"},
    "cli": MIDDLE | SERVICES | {"integrations", "train", "explain", "sweep"},
    # The public names, by their paths as text: it imports nothing.
    "public": set(),
}
"""Which other rooms each room may import. The package's own `__init__` may import all: it is the shop window."""

MOST_FILES, MOST_LINES = 14, 450
MOST_LINES_OF_CONTROL, MOST_TUNED = 650, 8
PURE = {"noise", "control", "batch", "errors"}
UNSEEN = {
    "torch.distributed": "a process group",
    "os": "the environment",
    "time": "a clock",
    "datetime": "a clock",
    "pathlib": "a file",
    "io": "a file",
    "socket": "the network",
    "subprocess": "a process",
}
DRAWERS = {"utils", "utilities", "common", "core", "helpers", "misc"}


def _imports(tree, module):
    """Every module that a file imports, at any depth of its code, and names taken from a package as `package.name`."""
    package = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _room(module):
    """dptrain.noise.scale → noise; the package itself and names taken straight from it → the shop window ("")."""
    name = module.removeprefix("dptrain").removeprefix(".").split(".")[0]
    return {"__main__": "cli"}.get(name, name if name in MAY_IMPORT else "")


def broken_arrows(source, module):
    """The imports of a file that point up, sideways, back through the shop window, or out of the package."""
    names = list(_imports(ast.parse(source), module))
    outside = [f"{module}: {name}" for name in names if name.split(".")[0] in ROOMS_ROUND_IT]
    room = _room(module)
    if not room:
        return outside
    targets = {_room(name): name for name in names if name.split(".")[0] == "dptrain"}
    return outside + [
        f"{module}: {room} → {to or 'the package itself'} ({name})"
        for to, name in targets.items()
        if to != room and to not in MAY_IMPORT[room]
    ]


def impurities(source, module):
    """What a pure room sees of the world: forbidden imports, `torch.distributed` by its dots, and `open(`."""
    if _room(module) not in PURE:
        return []
    tree = ast.parse(source)
    seen = [
        f"{module} imports {name}: {what}"
        for name in _imports(tree, module)
        for hidden, what in UNSEEN.items()
        if name == hidden or name.startswith(f"{hidden}.")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            seen.append(f"{module} uses torch.distributed: a process group")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "open":
            seen.append(f"{module} opens a file")
    return seen


def code_in_window(source):
    """The statements of an `__init__` that are neither its docstring, an import nor `__all__`."""
    body = ast.parse(source).body
    body = body[1:] if body and ast.get_docstring(ast.parse(source)) else body
    return [
        ast.unparse(node)
        for node in body
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and not (isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"])
    ]


def code_lines(source):
    """The number of lines that are neither blank, nor a comment, nor part of a docstring or of a field's text."""
    tree = ast.parse(source)
    texts = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and at not in texts for at, line in lines)


def is_drawer(path):
    """Tell whether a file or a folder on its way is named after nothing in particular."""
    return bool(DRAWERS & {Path(part).stem for part in path.parts})


def _files():
    return sorted(PACKAGE.rglob("*.py"))


def _all_files():
    """Those of the package and of the folders round it."""
    return [*_files(), *(path for name in ROOMS_ROUND_IT for path in sorted((ROOT / name).rglob("*.py")))]


def _module(path):
    """The dotted name under which a file is imported."""
    return _place(path).removesuffix(".__init__")


def _place(path):
    """The dotted name whose parent a file's relative imports start from; an `__init__` keeps its own name for it."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def cycles(graph):
    """The modules of one import cycle, or nothing; `graph` maps each module to what it imports."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_arrows_of_import_point_down():
    """No file imports a room that the design does not let it."""
    assert _files()
    assert [line for path in _files() for line in broken_arrows(path.read_text(encoding="utf-8"), _place(path))] == []


def test_every_room_is_on_the_plan():
    """A new folder or file of the package has its arrows here before it has code."""
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in _files()}
    assert rooms - {"__init__", "__main__"} <= set(MAY_IMPORT)


def test_the_plan_itself_has_no_cycle():
    """The allowed arrows can be laid on floors."""
    assert cycles(MAY_IMPORT) == []


def test_no_file_imports_itself_in_a_circle():
    """Inside a room too, files can be read from the bottom up."""
    modules = {_module(path) for path in _files()}
    graph = {}
    for path in _files():
        names = _imports(ast.parse(path.read_text(encoding="utf-8")), _place(path))
        found = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[_module(path)] = (found & modules) - {_module(path)}
    assert cycles(graph) == []


def test_pure_rooms_see_no_process_file_or_clock():
    """What decides can be run in milliseconds on a train without network."""
    assert [line for path in _files() for line in impurities(path.read_text(encoding="utf-8"), _place(path))] == []


def test_shop_windows_hold_no_code():
    """An `__init__` is a docstring, imports and `__all__`."""
    windows = [path for path in _all_files() if path.name == "__init__.py"]
    assert windows
    assert {
        str(path.relative_to(ROOT)): code
        for path in windows
        if (code := code_in_window(path.read_text(encoding="utf-8")))
    } == {}


def test_folders_and_files_are_small():
    """A folder holds at most 14 Python files, and a file at most 450 lines: in package, benchmarks and tests alike."""
    files = _all_files()
    assert {path.relative_to(ROOT).parts[0] for path in files} == {"dptrain", *ROOMS_ROUND_IT}
    counts = Counter(path.parent.relative_to(ROOT) for path in files)
    assert {str(folder): count for folder, count in counts.items() if count > MOST_FILES} == {}
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_control_is_small():
    """`control` without contrib has at most 650 lines of code, and at most 8 constants that were tuned on data."""
    assert code_lines('"""A.\n\nB.\n"""\n\nx = 1  # c\n"""C"""\n# d\n\ny = """\nz"""\n') == 3
    sources = [path.read_text(encoding="utf-8") for path in sorted((PACKAGE / "control").glob("*.py"))]
    assert sum(map(code_lines, sources)) <= MOST_LINES_OF_CONTROL
    assert sum(source.count("Tuned on") for source in sources) <= MOST_TUNED


def test_no_file_is_a_drawer():
    """A file is named after what it does."""
    assert [str(path) for path in _all_files() if is_drawer(path.relative_to(ROOT))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dptrain.noise.scale", "from dptrain.control import OnGrid"),
        ("dptrain.noise.scale", "def f():\n    import dptrain.train.step"),
        ("dptrain.noise.scale", "from ..control import OnGrid"),
        ("dptrain.noise.scale", "from dptrain import control"),
        ("dptrain.noise.scale", "from dptrain import attach"),
        ("dptrain.noise.scale", "import dptrain"),
        ("dptrain.noise.__init__", "from ..train import Trainer"),
        ("dptrain.train.step", "from dptrain.explain.report import draw_report"),
        ("dptrain.explain.report", "if TYPE_CHECKING:\n    from dptrain.train import Trainer"),
        ("dptrain.data.stream", "from dptrain.tasks import Task"),
        ("dptrain.observe.meter", "from dptrain.control import Controller"),
        ("dptrain.checkpoint.store", "from dptrain.tracking.jsonl import read_rows"),
        ("dptrain.tracking.run_log", "from dptrain.runtime.signals import EXIT_RESUMABLE"),
        ("dptrain.explain.report", "from dptrain.sweep import SweepSpec"),
        ("dptrain.data.stream", "from dptrain.noise import NoiseScale"),
        ("dptrain.integrations.lightning", "from dptrain.train import Trainer"),
        ("dptrain.errors", "from dptrain.batch import BatchPlan"),
        ("dptrain.train.step", "from dptrain.cli.main import main"),
        ("dptrain.train.step", "from benchmarks import harness"),
        ("dptrain.__init__", "import tests.runs"),
    ],
)
def test_an_arrow_that_points_up_is_found(module, source):
    """A planted import against the design is reported, wherever in the file and however it is written."""
    assert len(broken_arrows(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dptrain.noise.scale", "from .moments import Moments"),
        ("dptrain.noise.scale", "from dptrain.errors import ConfigError"),
        ("dptrain.noise.scale", "from dptrain import errors"),
        ("dptrain.cli.main", "from dptrain.train import Trainer"),
        ("dptrain.__main__", "from dptrain.cli.main import main"),
        ("dptrain.__init__", "from dptrain.train import Trainer"),
    ],
)
def test_an_arrow_that_points_down_is_not(module, source):
    """The checker lets through what the design allows."""
    assert broken_arrows(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "import os",
        "import os.path",
        "from os import environ",
        "from time import perf_counter",
        "def f():\n    from pathlib import Path",
        "import socket as s",
        "import torch.distributed as dist",
        "from torch import distributed",
        "import torch\ntorch.distributed.get_rank()",
        "open('x')",
    ],
)
def test_a_look_at_the_world_is_found(source):
    """Each forbidden sight is reported in a pure room, and none of them elsewhere."""
    assert impurities(source, "dptrain.noise.scale")
    assert not impurities(source, "dptrain.train.step")
    assert not impurities("import math\nimport torch", "dptrain.noise.scale")


@pytest.mark.parametrize("source", ["x = 1", "def f(): ...", "if True:\n    import os", "'''Doc.'''\n'''Again.'''"])
def test_code_in_a_shop_window_is_found(source):
    """Anything but docstring, imports and `__all__` is reported."""
    assert code_in_window(source)
    assert not code_in_window("'''Doc.'''\nfrom a import b\n__all__ = ['b']")


def test_drawers_and_circles_are_found():
    """A drawer is found as file and as folder, a circle through any number of files."""
    assert is_drawer(Path("dptrain/train/utils.py"))
    assert is_drawer(Path("dptrain/common/names.py"))
    assert not is_drawer(Path("dptrain/noise/scale.py"))
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
