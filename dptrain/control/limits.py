"""All limits of a run, in the order in which they overrule each other."""

from __future__ import annotations

from dataclasses import dataclass

from dptrain.control.base import Controller
from dptrain.control.limit import BatchSizeGrid, Bounds, DeadBand, GrowOnly, MaxChange, Rounding, ShrinkBand
from dptrain.control.patience import DwellTime, Probe
from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a batch may do, for `limited`. None: not limited in this way."""

    largest: int
    """Largest global batch, in samples."""
    smallest: int | None = None
    """Smallest global batch, in samples; None for the least that the replicas run."""
    powers_of_two: bool = True
    """Only batches of quantum × 2^k, so that a compiled model meets a handful of shapes; else all multiples."""
    max_change: float | None = 2.0
    """Largest factor by which one decision changes the batch, at least 2; where it is too large by more than the square
    of that, it shrinks by half of the way, in log space."""
    dead_band: float | None = None
    """Ratio of batches, above 1, below which a change is not worth making."""
    shrink_band: float | None = None
    """Ratio, above 1, below which a batch that is too large does not shrink."""
    grow_only_samples: int = 0
    """Samples from the start in which the batch does not shrink."""
    dwell_samples: int = 0
    """Samples that must pass after the start or a change before the next one."""
    dwell_decisions: int = 0
    """Measured decisions that must pass after the start or a change before the next one."""
    probe_steps: int = 0
    """Measured steps for which the double is tried, at least, where the batch has stayed for four times as many; 0: it
    is not tried."""


def limited(law: Controller, *, quantum: int, limits: Limits) -> Controller:
    """Wrap `law` in all of `limits`, in the order in which they may overrule each other.

    Law → dead band → probe → shrink band → growth alone → dwell → rounding → largest change → bounds: the further out,
    the harder. A probe begins where the law behind its dead band is content, not where a batch too large for it stays.
    So the result is always a rung of the ladder within the bounds, and what is wise yields to what runs. From a batch
    on the ladder and within the bounds, every limit holds at once; from one that is not (a run resumed on other
    hardware), the outer ones go first. On a measurement that stays the same the batch turns back from a probe alone.

    Args:
        law: what to limit.
        quantum: samples that the batch must be a multiple of: smallest micro-batch × world size.
        limits: the settings.

    Raises:
        ConfigError: where a setting is out of range, or no rung lies within the bounds.
    """
    grid = BatchSizeGrid(quantum=quantum, powers_of_two=limits.powers_of_two)
    smallest = grid.above(quantum if limits.smallest is None else limits.smallest)
    largest = grid.below(limits.largest)
    if not smallest <= largest <= limits.largest:
        raise ConfigError(
            f"no batch between smallest {limits.smallest or quantum} and largest {limits.largest} can run: the "
            f"batches that can are {grid}; largest must be at least {smallest}"
        )
    controller = law
    if limits.dead_band is not None:
        controller = DeadBand(controller, ratio=limits.dead_band)
    if limits.probe_steps:
        controller = Probe(controller, steps=limits.probe_steps, largest=largest)
    if limits.shrink_band is not None:
        controller = ShrinkBand(controller, ratio=limits.shrink_band)
    if limits.grow_only_samples:
        controller = GrowOnly(controller, samples=limits.grow_only_samples)
    if limits.dwell_samples or limits.dwell_decisions:
        controller = DwellTime(controller, samples=limits.dwell_samples, decisions=limits.dwell_decisions)
    controller = Rounding(controller, grid=grid)
    if limits.max_change is not None:
        controller = MaxChange(controller, factor=limits.max_change, grid=grid)
    return Bounds(controller, smallest=smallest, largest=largest)
