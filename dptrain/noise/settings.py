"""The settings of `noise`: how the noise scale is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dptrain.ranges import AT_LEAST_1, LEVEL, POSITIVE, setting


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How the noise scale is measured."""

    observer: Literal["parameters", "hook"] = "parameters"
    """parameters: each micro-batch; hook: each replica's accumulated gradient, in DDP's communication hook."""
    memory: float = setting(0.2, POSITIVE)
    """Half-life of the running means, as a fraction of the run so far, in samples or in steps: the faster counts."""
    every: int | None = setting(None, AT_LEAST_1)
    """Steps between two that are measured. Default: what the budget allows; 1 where control.mode=adapt, the law reads
    no clock, and batch or learning rate follow the noise scale, so that a seed decides the run."""
    budget: float = setting(0.01, POSITIVE)
    """Share of the step time that measuring may take, where `every` is not given."""
    half_life_samples: float | None = setting(None, POSITIVE)
    """A fixed half-life instead, in samples."""
    level: float = setting(0.95, LEVEL)
    """Confidence of the interval."""
    groups: bool | Literal["experts", "local_blocks"] = False
    """Measure parts of the model one by one as well. true: its first-level modules; experts: each expert; local_blocks:
    each part that is trained by a loss of its own."""
