"""Which view a run has on the console: live on a terminal that can redraw, one line per event elsewhere.

The views take the rows of `metrics.jsonl` and `decisions.jsonl` (see jsonl.py). Text from outside (names, reasons,
warnings) is shown without secrets, with its control characters spelled out, and never read as markup. A stream that
breaks ends the view, not the run.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from dptrain.tracking.line_view import LineView

if TYPE_CHECKING:
    from dptrain.tracking.view import View


def make_view(
    *,
    max_samples: int,
    title: str,
    print_every_steps: int = 1,
    num_steps: int | None = None,
    stream: TextIO | None = None,
    level: float = 0.95,
    style: str = "auto",
) -> View:
    """Choose the live view where `stream` is a terminal that can show it, else the view of lines; or JSON.

    Args:
        max_samples: length of the run in samples.
        title: what is trained and where; the first line, or above the progress.
        print_every_steps: steps between two printed lines; the live view shows the newest step.
        num_steps: length of the run in steps, where the batch is constant.
        stream: where to write; None is standard output as it is now.
        level: level of the noise scale's interval, as the rows have it.
        style: "auto", or "json" for one JSON object per line.
    """
    stream = sys.stdout if stream is None else stream
    if style == "json":
        from dptrain.tracking.json_view import JsonView

        return JsonView(stream=stream, max_samples=max_samples, print_every_steps=print_every_steps)
    if _is_capable_terminal(stream):
        from dptrain.tracking.live_view import LiveView  # rich takes 0.1 s to load, and a log file has no use for it

        return LiveView(stream=stream, max_samples=max_samples, title=title, level=level)
    view = LineView(stream=stream, max_samples=max_samples, print_every_steps=print_every_steps, num_steps=num_steps)
    view.note(title)
    return view


def _is_capable_terminal(stream: TextIO) -> bool:
    try:
        terminal = stream.isatty()
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False
    return terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
