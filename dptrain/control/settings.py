"""The settings of `control`: which law decides the global batch size, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dptrain.ranges import ABOVE_1, AT_LEAST_0, AT_LEAST_1, AT_LEAST_2, POSITIVE, between, setting


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How the global batch is decided."""

    mode: Literal["off", "measure", "advise", "adapt"] = "adapt"
    """Measure and adapt. off: neither; measure: noise scale only; advise: decisions are logged, not applied; adapt:
    decisions are applied."""
    law: Literal[
        "goodput",
        "noise",
        "exchange_rate",
        "norm_test",
        "pollux",
        "seesaw",
        "ramp",
        "kaplan",
        "schedule",
        "constant",
    ] = "goodput"
    """goodput: most progress per second, by the measured time of a step; noise: ratio × noise scale; exchange_rate:
    √(samples_per_step × noise scale); norm_test: noise scale / tolerance²; pollux: goodput with its overlap; seesaw:
    doubles where the schedule halves the rate; ramp: a warm-up to ramp_to; kaplan: from the loss per token; schedule:
    as given; constant. docs/adapt.md says which is for whom."""
    ratio: float = setting(1.0, POSITIVE)
    """Batch over noise scale, for law=noise; over the critical batch, for law=kaplan."""
    critical_ratio: float | None = setting(None, POSITIVE)
    """Critical batch size, at which a run needs twice the samples, over the noise scale, for law=goodput and for plans.
    Default: 3 for adamw, 1 for sgd."""
    margin: float | None = setting(None, POSITIVE)
    """Factor on the critical batch for law=goodput: a batch too small for its rate lowers the noise scale that is
    measured, and so confirms itself. Below 1 it saves samples. Default: 2/3 for adamw, 1 for sgd."""
    samples_per_step: float | None = setting(None, POSITIVE)
    """Samples that one optimizer step fewer is worth, for law=exchange_rate."""
    tolerance: float | None = setting(None, POSITIVE)
    """Standard deviation of the gradient over its size, for law=norm_test."""
    overlap: float = setting(2.0, between(1, 10))
    """How well the all-reduce hides behind the backward pass, from 1 (not at all) to 10, for law=pollux."""
    tokens_per_sample: int | None = setting(None, AT_LEAST_1)
    """Length of a sequence, for law=kaplan."""
    ramp_to: int | None = setting(None, AT_LEAST_1)
    """Batch at the end of the warm-up, in samples, for law=ramp."""
    ramp_samples: int | None = setting(None, AT_LEAST_1)
    """Length of the warm-up of the batch, in samples, for law=ramp."""
    ramp_shape: Literal["linear", "doubling"] = "linear"
    """By equal amounts, or by doublings, over equal numbers of samples."""
    schedule: str | None = None
    """Batches by position in samples, for law=schedule: "0:64 100000:128 1M:256"."""
    z: float = setting(1.0, POSITIVE)
    """Standard errors at which a noise scale counts as ruled out."""
    smallest: int | None = setting(None, AT_LEAST_1)
    """Smallest global batch, in samples. Default: a full micro-batch on each replica, or the first batch if smaller;
    of a schedule, its own."""
    largest: int | None = setting(None, AT_LEAST_1)
    """Largest global batch, in samples. Default: 64 times the first, but at least 50 steps in the run;
    of a schedule, its own."""
    powers_of_two: bool = True
    """Only batches that differ from the first by a power of two."""
    max_change: float = setting(2.0, AT_LEAST_2)
    """Largest factor of one change. A batch that is too large by more than its square goes half of the way down."""
    dead_band: float | None = setting(None, ABOVE_1)
    """Ratio of batches below which a change is not worth making. Default, with powers_of_two and a law that measures:
    1.6. Half-way between two rungs, at 1.41, both are as good, and the batch would go to and fro."""
    shrink_band: float | None = setting(None, ABOVE_1)
    """Ratio by which a batch must be too large before it shrinks. Default, with powers_of_two and law=goodput: 2.25,
    for a batch too small confirms itself and one too large does not."""
    dwell_samples: int = setting(0, AT_LEAST_0)
    """Samples that must pass from the start, or a change, to the next change."""
    dwell_decisions: int = setting(10, AT_LEAST_0)
    """Steps that must be measured from the start, or a change, to the next change by a factor of two; fewer where the
    batch is wrong by more."""
    probe_steps: int | None = setting(None, AT_LEAST_0)
    """Measured steps for which the double is tried, at least, where the batch has stayed for four times as many; it is
    kept where the law is content with it, too, or finds it too large by less than shrink_band. 0: never. Default: 50
    for law=goodput where it adapts, else 0."""
