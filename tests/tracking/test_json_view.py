"""The console as JSON: each line an object, nothing that steers a terminal, and a stream that breaks ends it."""

from __future__ import annotations

import io
import json

from dptrain.tracking.console import make_view

ROW = {"kind": "train", "step": 1, "progress/samples": 64, "train/loss": float("nan"), "train/lr": 0.1}


def test_each_event_is_one_object_on_a_line():
    """Steps that are due, evaluations, decisions and notes come out as objects that name their event."""
    stream = io.StringIO()
    with make_view(max_samples=640, title="x", print_every_steps=5, stream=stream, style="json") as view:
        for step in (1, 2, 5):
            view.update({**ROW, "step": step})
        view.evaluation({"kind": "eval", "step": 5, "progress/samples": 320, "eval/loss": 0.5})
        view.decision({"step": 5, "batch/before": 64, "batch/after": 128, "reason": "above\x1b[2J"})
        view.note("a notice\nin two lines")
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["train", "train", "eval", "decision", "note"]
    assert [event["step"] for event in events[:2]] == [1, 5]
    assert "train/loss" not in events[0]
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().isascii()


def test_a_stream_that_breaks_ends_the_view_alone():
    """After a closed stream the view is silent, and nothing is raised."""
    stream = io.StringIO()
    view = make_view(max_samples=640, title="x", stream=stream, style="json")
    stream.close()
    view.note("lost")
    view.update(ROW)
    view.close()
