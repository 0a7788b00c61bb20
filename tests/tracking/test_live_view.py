"""The live view shows what the rows say, stays within its share of the time, and leaves the terminal as it was."""

from __future__ import annotations

import re
import sys
import time

import pytest

from dptrain.tracking import live_view as view
from dptrain.tracking.console import make_view
from dptrain.tracking.live_view import LiveView
from tests.tracking.made_views import DECISION, EVALUATION, Terminal, live, train_row

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"

pytestmark = pytest.mark.usefixtures("plain_environment")


def test_the_live_view_shows_what_the_rows_say():
    """Progress, losses, batch with its layout, noise scale with interval and level, rate, speed and drops are there."""
    terminal = Terminal()
    with live(terminal, level=0.9) as shown:
        shown.note("wandb records offline")
        shown.update(train_row())
        shown.evaluation(EVALUATION)
        shown.decision(DECISION)
    for text in (
        "wandb records offline",
        "pysource",
        "3,840/40,000 samples",
        "eta 0:29",
        "training loss      2.913",
        "held-out loss      2.950",
        "bits per byte      4.200",
        "global batch       32 = 8 micro-batch × 2 accumulation × 2 replicas",
        "noise scale, 90 %  210 [150, 330]",
        "learning rate      1.0e-3",
        "1,240 samples/s",
        "steps              120\n",
        "step 120  batch 32 → 1,024, lr ×1.41: the noise scale is above 64",
    ):
        assert text in terminal.text


def test_what_stays_is_printed_once():
    """Decisions and notes are not redrawn with the table."""
    terminal = Terminal()
    with live(terminal) as shown:
        shown.decision(DECISION)
        for step in range(5):
            shown.evaluation({**EVALUATION, "step": step})
    assert terminal.text.count("the noise scale is above 64") == 1
    assert terminal.text.count("held-out loss") >= 5


def test_updates_are_cheap_and_drawn_seldom():
    """A step costs less than 100 µs where no redraw is due, and a burst of steps is one redraw."""
    terminal = Terminal()
    with live(terminal) as shown:
        shown.update(train_row())
        drawn, times = terminal.getvalue().count("training loss"), []
        shown._due_at = time.monotonic() + 60
        row = train_row()
        for _ in range(500):
            begun = time.perf_counter()
            shown.update(row)
            times.append(time.perf_counter() - begun)
        assert terminal.getvalue().count("training loss") == drawn == 1
    assert sorted(times)[len(times) // 2] < 100e-6


def test_drawing_takes_a_bounded_share_of_the_time(monkeypatch):
    """A terminal that is slow to draw on is drawn on less often."""
    clock = [0.0]
    monkeypatch.setattr(view.time, "monotonic", lambda: clock[0])
    with live(Terminal()) as shown:
        draws = []

        def slow_refresh():
            draws.append(clock[0])
            clock[0] += 1.0

        monkeypatch.setattr(shown._live, "refresh", slow_refresh)
        for _ in range(1000):
            shown.update(train_row())
            clock[0] += 1.0
    assert len(draws) <= 11


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_cursor_comes_back(error):
    """However the run ends, the terminal has its cursor and Python its standard output."""
    terminal, before = Terminal(), (sys.stdout, sys.stderr)
    try:
        with live(terminal) as shown:
            shown.update(train_row())
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    shown.close()
    assert terminal.getvalue().rfind(SHOW_CURSOR) > terminal.getvalue().rfind(HIDE_CURSOR) >= 0
    assert (sys.stdout, sys.stderr) == before


def test_what_the_task_prints_goes_above_the_live_view(monkeypatch):
    """A print of somebody else neither tears the table nor gets lost."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with make_view(max_samples=100, title="t") as shown:
        assert isinstance(shown, LiveView)
        shown.update(train_row())
        print("from the task")  # noqa: T201 - the point of the test
        shown.update(train_row())
    assert sys.stdout is terminal
    assert "from the task\n" in terminal.text


def test_markup_from_outside_is_shown_as_it_is():
    """Square brackets and emoji codes in a reason are text."""
    terminal = Terminal()
    with live(terminal) as shown:
        shown.decision({**DECISION, "reason": "[bold]x[/bold] [/] :smile:"})
        shown.note("[red]y")
    assert "[bold]x[/bold] [/] :smile:" in terminal.text
    assert "[red]y" in terminal.text


def test_the_title_is_not_cut(monkeypatch):
    """A title longer than the terminal is wide takes several rows."""
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    title = "resnet-of-some-length on 16 cuda replicas → runs/a-folder-with-a-long-name-20260101-120000"
    with LiveView(stream=terminal, max_samples=40_000, title=title) as shown:
        shown.update(train_row())
    assert title.replace(" ", "") in re.sub(r"\s+", "", terminal.text)


def test_a_terminal_without_utf8_gets_ascii():
    """The live view draws with ASCII alone where the locale has no UTF-8."""
    terminal = Terminal()
    terminal.encoding = "ascii"
    with make_view(stream=terminal, max_samples=40_000, title="digits → runs/a") as shown:
        shown.update(train_row(**{"noise_scale/upper": None}))
        shown.decision(DECISION)
        shown.note("σ × 2")
    assert terminal.getvalue().isascii()
    assert "digits -> runs/a" in terminal.text
    assert "210 [150, inf]" in terminal.text
    assert "batch 32 -> 1,024, lr x1.41" in terminal.text


def test_a_narrower_terminal_is_left_clean():
    """Lines that the terminal wraps when it gets narrower are erased with the rest of the drawing."""
    terminal = Terminal()
    with live(terminal) as shown:
        shown.update(train_row())
        drawn = [line for line in terminal.text.splitlines() if line.strip()]
        rows = 1 + sum(-(-len(line) // 40) for line in drawn)  # 1: the empty line at the top
        shown._console.width = 40
        before = len(terminal.getvalue())
        shown.evaluation(EVALUATION)
        erased = terminal.getvalue()[before:]
    assert erased.count("\x1b[1A") == rows - 1
    assert erased.count("\x1b[2K") == rows
