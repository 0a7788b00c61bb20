"""What a person sees says what the rows say, on any stream, and never gets in the way of training."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time

import pytest

from dptrain.tracking import live_view as view
from dptrain.tracking.console import LineView, make_view
from dptrain.tracking.live_view import LiveView
from dptrain.tracking.row_text import noise_scale_text

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def train_row(**changes):
    return {
        "kind": "train",
        "step": 120,
        "progress/samples": 3840,
        "progress/epoch": 0.5,
        "progress/wall_s": 3.1,
        "train/loss": 2.9134,
        "train/lr": 1e-3,
        "train/grad_norm": 1.5,
        "train/steps_dropped": 0,
        "batch/global": 32,
        "batch/micro": 8,
        "batch/accumulation": 2,
        "noise_scale/value": 210.0,
        "noise_scale/lower": 150.0,
        "noise_scale/upper": 330.0,
        "noise_scale/state": "resolved",
        "throughput/samples_per_sec": 1240.0,
        **changes,
    }


EVALUATION = {
    "kind": "eval",
    "step": 120,
    "progress/samples": 3840,
    "eval/bits_per_byte": 4.2,
    "eval/loss": 2.95,
}
DECISION = {
    "step": 120,
    "progress/samples": 3840,
    "batch/before": 32,
    "batch/after": 1024,
    "lr_factor/before": 1.0,
    "lr_factor/after": 2.0**0.5,
    "reason": "the noise scale is above 64",
}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return not super().isatty()  # which raises where the stream is closed

    @property
    def text(self):
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "40")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def live(terminal, **options):
    return LiveView(stream=terminal, max_samples=40_000, title="pysource", **options)


def plain(**options):
    stream = io.StringIO()
    return stream, LineView(stream=stream, max_samples=40_000, **options)


def test_the_line_view_prints_one_line_for_each_event():
    """A log step, an evaluation, a decision and a note are a line each, with the figures in it."""
    stream, shown = plain()
    with shown:
        shown.note("wandb records offline")
        shown.update(train_row())
        shown.evaluation(EVALUATION)
        shown.decision(DECISION)
        shown.decision({**DECISION, "applied": False})
        shown.update(train_row(**{"step": 121, "progress/samples": 4864, "train/steps_dropped": 1, "train/loss": None}))
    assert stream.getvalue() == (
        "wandb records offline\n"
        "step 120 | 3,840/40,000 samples | loss 2.913 | lr 1.0e-3 | batch 32 (8×2×2) | noise scale now 210 [150, 330] "
        "| 1,240 samples/s | eta 0:29\n"
        "step 120 | held-out loss 2.950 | bits per byte 4.200\n"
        "step 120 | batch 32 → 1,024, lr ×1.41: the noise scale is above 64\n"
        "step 120 | advice, not applied: batch 32 → 1,024, lr ×1.41: the noise scale is above 64\n"
        "step 121 | 4,864/40,000 samples | loss not finite | lr 1.0e-3 | batch 32 (8×2×2) | noise scale now 210 "
        "[150, 330] | 1,240 samples/s | eta 0:28 | skipped 1\n"
    )


def test_a_line_has_what_is_known():
    """Time of the step, utilisation and the length in steps are there where they are known."""
    stream, shown = plain(num_steps=1250)
    shown.update(train_row(**{"time/step_s": 0.0258, "ledger/mfu": 0.481}))
    shown.update(train_row(**{"time/step_s": 1.24, "ledger/mfu": None}))
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 120/1,250 | ")
    assert " | 26 ms | 1,240 samples/s | mfu 48 % | eta " in first
    assert " | 1.2 s | 1,240 samples/s | eta " in second


def test_a_rate_that_moves_at_a_constant_batch():
    """Then the rate alone is shown; where neither moves, as for advice that is taken back, the batch is."""
    stream, shown = plain()
    with shown:
        shown.decision({**DECISION, "batch/after": 32})
        shown.decision({**DECISION, "batch/after": 32, "lr_factor/after": 1.0})
    assert stream.getvalue() == (
        "step 120 | lr ×1.41: the noise scale is above 64\nstep 120 | batch 32 → 32: the noise scale is above 64\n"
    )


def test_the_line_view_prints_every_so_many_steps():
    """The first step and each multiple are printed, and no other."""
    stream, shown = plain(print_every_steps=50)
    for step in range(3, 151):
        shown.update(train_row(step=step))
    assert [line.split(" | ")[0] for line in stream.getvalue().splitlines()] == [
        "step 3",
        "step 50",
        "step 100",
        "step 150",
    ]


@pytest.mark.parametrize("name", [*train_row()])
def test_any_missing_field_leaves_a_gap_not_an_error(name):
    """A row of another make is shown as far as it goes, in both views."""
    row = train_row()
    del row[name]
    stream, shown = plain()
    shown.update(row)
    shown.update({})
    assert stream.getvalue().count("\n") == 2
    with live(Terminal()) as shown:
        shown.update(row)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "210 [150, 330]"),
        ({"noise_scale/value": 1200.0, "noise_scale/lower": 930.0, "noise_scale/upper": 1649.0}, "1.2k [0.9k, 1.6k]"),
        ({"noise_scale/value": 1200.0, "noise_scale/lower": 20.0, "noise_scale/upper": None}, "1.2k [20, ∞]"),
        (
            {"noise_scale/value": 12_000_000.0, "noise_scale/lower": 9_000_000.0, "noise_scale/upper": 2e7},
            "12M [9.0M, 20M]",
        ),
        ({"noise_scale/value": 3.24, "noise_scale/lower": 0.5, "noise_scale/upper": 9.97}, "3.2 [0.5, 10]"),
        (
            {
                "noise_scale/state": "at least",
                "noise_scale/value": None,
                "noise_scale/lower": 800.0,
                "noise_scale/upper": None,
            },
            "at least 800",
        ),
        ({"noise_scale/state": "not resolved yet", "noise_scale/lower": 0.0}, "not resolved yet"),
        ({"noise_scale/state": "resolved", "noise_scale/value": None}, "not resolved yet"),
        ({"noise_scale/state": None}, "not measured"),
    ],
)
def test_the_noise_scale_is_said_as_it_is_known(changes, text):
    """A value comes with its interval, a bound as a bound, and nothing as nothing."""
    assert noise_scale_text(train_row(**changes)) == text


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


@pytest.mark.parametrize("hostile", ["\x1b[2J", "a\nb", "a\rb", "\u202eabc", "\x07", "\x9b2J"])
def test_text_from_outside_cannot_steer_the_terminal(hostile):
    """Escapes and line ends in a reason, a note, a title or a metric's name are spelled out."""
    escaped = repr(hostile)[1:-1]
    terminal = Terminal()
    stream, shown = plain()
    views = [shown, LiveView(stream=terminal, max_samples=1, title=f"T{hostile}")]
    for shown in views:
        with shown:
            shown.note(f"N{hostile}")
            shown.decision({**DECISION, "reason": f"R{hostile}"})
            shown.evaluation({**EVALUATION, f"eval/M{hostile}": 1.0})
    for output in (stream.getvalue(), terminal.getvalue()):
        assert hostile not in output
        assert all(f"{letter}{escaped}" in output for letter in "NRM")
    assert f"T{escaped}" in terminal.getvalue()
    assert stream.getvalue().count("\n") == 3


def test_markup_from_outside_is_shown_as_it_is():
    """Square brackets and emoji codes in a reason are text."""
    terminal = Terminal()
    with live(terminal) as shown:
        shown.decision({**DECISION, "reason": "[bold]x[/bold] [/] :smile:"})
        shown.note("[red]y")
    assert "[bold]x[/bold] [/] :smile:" in terminal.text
    assert "[red]y" in terminal.text


@pytest.mark.parametrize("kind", [LineView, LiveView])
@pytest.mark.parametrize("closed_by", ["reader", "us"])
def test_a_closed_stream_ends_the_view_not_the_run(kind, closed_by):
    """A reader that is gone, or a stream that was closed, is met with silence."""
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w", encoding="utf-8")
    before = sys.stdout, sys.stderr
    options = {"title": "t"} if kind is LiveView else {}
    with kind(stream=stream, max_samples=10, **options) as shown:
        shown.update(train_row())
        os.close(reader)
        if closed_by == "us":
            try:
                stream.close()
            except BrokenPipeError:
                pytest.fail("nothing was left to write")
        for step in range(3):
            shown.evaluation({**EVALUATION, "step": step})
            shown.decision(DECISION)
            shown.note("x")
            shown.update(train_row())
    assert (sys.stdout, sys.stderr) == before
    stream.close()


@pytest.mark.parametrize("full", [True, False])
def test_a_run_whose_reader_leaves_exits_well(tmp_path, full):
    """`dptrain train | head`, or a full disk under the log, costs neither the exit code nor a traceback."""
    program = """
import sys
from dptrain.tracking.console import make_view
with make_view(max_samples=10, title="t") as view:
    for step in range(2000):
        view.note("x" * 100)
open(sys.argv[1], "w").write("trained to the end")
"""
    ended = tmp_path / "ended"
    target = open("/dev/full", "w") if full else subprocess.PIPE  # noqa: SIM115, PTH123 - handed to the process
    with subprocess.Popen([sys.executable, "-c", program, ended], stdout=target, stderr=subprocess.PIPE) as process:
        if not full:
            process.stdout.readline()
            process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
    if full:
        target.close()
    assert ended.read_text() == "trained to the end"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_cannot_say_everything_gets_what_it_can(encoding):
    """Characters that the stream lacks are spelled in ASCII; the line is there."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    shown = make_view(stream=stream, max_samples=40_000, title="t")
    shown.update(train_row())
    shown.decision(DECISION)
    assert b"batch 32 -> 1,024" in raw.getvalue()


def test_the_view_fits_the_stream(monkeypatch):
    """Live on a terminal; plain in a file, on a terminal that cannot redraw, and where there is none."""

    def kind(stream):
        with make_view(stream=stream, max_samples=1, title="t") as shown:
            return type(shown)

    narrow, closed = Terminal(), Terminal()
    narrow.encoding = "ascii"
    closed.close()
    assert kind(Terminal()) is LiveView
    assert kind(io.StringIO()) is LineView
    assert kind(narrow) is LiveView
    assert kind(closed) is LineView
    monkeypatch.setenv("TERM", "dumb")
    assert kind(Terminal()) is LineView
    monkeypatch.setattr(sys, "stdout", None)
    shown = make_view(max_samples=1, title="t")
    shown.note("nobody hears")
    assert type(shown) is LineView


def test_time_left_counts_all_time_and_speed_only_training():
    """Where half of the time goes into evaluations, twice the time is left, at the same speed while training."""
    stream, shown = plain()
    for step in range(1, 101):
        done = 100 * step
        shown.update(
            train_row(**{"step": step, "progress/samples": done, "progress/wall_s": 0.2 * step, "batch/global": 100})
            | {"throughput/samples_per_sec": 1000.0}
        )
    last = stream.getvalue().splitlines()[-1]
    assert " | 1,000 samples/s | eta 1:00" in last


def test_a_resumed_run_estimates_from_what_it_does_itself():
    """The time of earlier attempts does not make the first estimates wild."""
    stream, shown = plain()
    shown.update(train_row(**{"progress/wall_s": 1000.0}))
    assert "eta 0:29" in stream.getvalue()


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
