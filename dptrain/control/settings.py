"""The settings of `control`: which law decides the global batch size, and its bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from dptrain.ranges import AT_LEAST_0, AT_LEAST_1, POSITIVE, setting


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How the global batch is decided."""

    mode: Literal["off", "measure", "advise", "adapt"] = "adapt"
    """Measure and adapt. off: neither; measure: noise scale only; advise: decisions are logged, not applied; adapt:
    decisions are applied."""
    law: Literal["goodput", "noise", "schedule", "constant", "pollux", "seesaw", "kaplan"] = "goodput"
    """goodput: most progress per second; noise: in a fixed relation to the noise scale; schedule: as given; constant.
    For comparison: pollux, seesaw, kaplan (docs/batch-control.md)."""
    law_options: dict[str, Any] = field(default_factory=dict)
    """Numbers of one law. noise: ratio (batch over noise scale, default 1; 1/η² is the norm test of tolerance η) or
    samples_per_step (what a step fewer is worth: batch √(samples_per_step × noise scale)); pollux: overlap; kaplan:
    tokens_per_sample, ratio."""
    critical_ratio: float | None = setting(None, POSITIVE)
    """Critical batch size over noise scale, for law=goodput, plans and reports. Default: 1."""
    schedule: str | None = None
    """Batches by position in samples, for law=schedule: "0:64 100000:128", or "0:64..512 100K:512" for a ramp."""
    schedule_tokens: str | None = None
    """schedule with positions and batches in tokens: "0:64K 100M:128K"."""
    smallest: int | None = setting(None, AT_LEAST_1)
    """Smallest global batch, in samples. Default: a full micro-batch on each replica, or the first batch if smaller;
    of a schedule, its own."""
    smallest_tokens: int | None = setting(None, AT_LEAST_1)
    """Smallest global batch in tokens, in place of smallest."""
    largest: int | None = setting(None, AT_LEAST_1)
    """Largest global batch, in samples. Default: 64 times the first, but at least 50 steps in the run;
    of a schedule, its own."""
    largest_tokens: int | None = setting(None, AT_LEAST_1)
    """Largest global batch in tokens, in place of largest."""
    min_gain: float = setting(0.02, AT_LEAST_0)
    """Least gain in progress per second for a change, as a fraction."""
