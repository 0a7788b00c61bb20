"""Rows as a run writes them, a terminal that remembers, and the views of the two, for tests of what a person sees."""

from __future__ import annotations

import io
import re

from dptrain.tracking.console import LineView
from dptrain.tracking.live_view import LiveView


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


def live(terminal, **options):
    return LiveView(stream=terminal, max_samples=40_000, title="pysource", **options)


def plain(**options):
    stream = io.StringIO()
    return stream, LineView(stream=stream, max_samples=40_000, **options)
