"""`dptrain tasks`: the built-in tasks, one line each, with their options."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence


def tasks(arguments: Sequence[str]) -> int:
    """Print the built-in tasks: name, what is trained, and the options of each."""
    description = "List the built-in tasks. Your own is path/to/file.py:function; docs/tasks.md shows one."
    argparse.ArgumentParser(prog="dptrain tasks", description=description).parse_args(arguments)
    from dptrain.tasks import BUILT_IN

    width = max(map(len, BUILT_IN))
    for name, build in BUILT_IN.items():
        first = (inspect.getdoc(build) or "").partition("\n")[0].rstrip(".")
        sys.stdout.write(f"{name:<{width}}  {first}\n")
        options = [_option(parameter) for parameter in inspect.signature(build).parameters.values()]
        if options:
            sys.stdout.write(f"{'':<{width}}  --task-options.NAME: {', '.join(options)}\n")
    sys.stdout.write("your own: --task path/to/file.py:function, see docs/tasks.md\n")
    return 0


def _option(parameter: inspect.Parameter) -> str:
    needed = parameter.default is inspect.Parameter.empty
    return f"{parameter.name} ({'required' if needed else repr(parameter.default)})"
