"""What a person sees says what the rows say, on any stream, and never gets in the way of training."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from dptrain.tracking.console import LineView, make_view
from dptrain.tracking.live_view import LiveView
from tests.tracking.made_views import DECISION, EVALUATION, Terminal, live, plain, train_row

pytestmark = pytest.mark.usefixtures("plain_environment")


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
