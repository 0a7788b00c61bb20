"""What a person sees of a sweep: lines where there is no terminal, a table where there is one."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from dptrain.sweep import Course, SweepSpec, search
from dptrain.sweep import view as sweep_view
from dptrain.sweep.view import Standing, SweepView


@pytest.fixture
def shown(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sweep_view.time, "monotonic", lambda: now[0])
    spec = SweepSpec(
        batch_sizes=[8, 64],
        targets=[0.5, 0.2],
        seeds=[0],
        learning_rates=[0.1, 0.2],
        base_batch_size=8,
        base_learning_rate=0.1,
        base_samples=800,
        exponent=0.5,
    )
    slow, fast = (spec.run(8, grid_point=grid_point, seed=0) for grid_point in (0, 1))
    courses = {
        slow: Course(positions=[80, 160, 240], losses=[0.9, 0.7, 0.6]),
        fast: Course(positions=[80, 160, 240, 320], losses=[0.8, 0.4, 0.2, 0.1]),
    }

    def course_of(run):
        return courses.get(run, Course())

    def standing():
        searches = [search(spec, batch, course_of) for batch in spec.batch_sizes]
        return Standing(searches=searches, running=[slow], samples_per_s=10.0)

    def view(*, terminal):
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=120, highlight=False, soft_wrap=not terminal)
        return SweepView(spec, course_of=course_of, console=console), output

    return {"now": now, "fast": fast, "slow": slow, "courses": courses, "standing": standing, "view": view}


def test_without_a_terminal_each_run_is_a_line(shown):
    """With what it reached, in samples and steps, and how far the sweep is."""
    view, output = shown["view"](terminal=False)
    view.ended(shown["fast"], shown["standing"]())
    (line,) = output.getvalue().splitlines()
    assert line.startswith("batch-8-lr-0.2-seed-0: 0.5 after 134 samples (16.8 steps)")
    assert "0.2 after 240 samples (30 steps); 1 of 4 runs so far, 1 under way, 0 of 2 batches done, left about " in line


def test_a_run_that_reached_nothing_says_how_low_it_came(shown):
    """And whether it diverged."""
    view, output = shown["view"](terminal=False)
    shown["courses"][shown["slow"]] = Course(positions=[80, 160], losses=[0.9, 9.0], is_over=True, has_diverged=True)
    view.ended(shown["slow"], shown["standing"]())
    assert output.getvalue().startswith("batch-8-lr-0.1-seed-0: diverged; no target, lowest held-out loss 9")


def test_a_line_a_minute_while_nothing_ends(shown):
    """The first one is due a minute after the start."""
    view, output = shown["view"](terminal=False)
    for seconds in (0, 1, 59, 61, 62, 119, 122):
        shown["now"][0] = seconds
        view.update(shown["standing"]())
    assert output.getvalue().count("\n") == 2


def test_a_terminal_has_a_table(shown):
    """One line per batch with its best run and what is under way; drawn without a thread, as runs are forked."""
    before = threading.active_count()
    view, output = shown["view"](terminal=True)
    assert threading.active_count() == before
    view.update(shown["standing"]())
    text = output.getvalue()
    view.close()
    assert "30 (lr 0.2)" in text
    assert "lr 0.1 seed 0 loss 0.6 30%" in text
    assert "0.1–0.2" in text
    assert "1 of 4 runs so far" in text


def test_hours_are_reported_as_hours(shown):
    """Seconds alone would have to be divided by the reader."""
    assert [sweep_view._duration(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
