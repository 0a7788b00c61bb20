"""The laws that measure nothing: a constant batch, and a list written before the run, of batches and ramps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from dptrain.control.base import Decision, Law, Measurement


@dataclass(frozen=True)
class Constant(Law):
    """One global batch from the first sample to the last.

    Attributes:
        global_batch_size: in samples.
    """

    global_batch_size: int

    def decide(self, measurement: Measurement) -> Decision:  # noqa: ARG002 - a constant looks at nothing
        """Ask for the same batch, whatever was measured."""
        return Decision(global_batch_size=self.global_batch_size, reason=f"constant batch of {self.global_batch_size}")


class Stage(NamedTuple):
    """A stretch of a run.

    Attributes:
        start: first sample.
        batch: global batch there, in samples.
        ramp_to: batch at the end of the stage, to which it rises or falls in a straight line; None: it stays.
    """

    start: int
    batch: int
    ramp_to: int | None = None


@dataclass(frozen=True)
class Schedule(Law):
    """A global batch for each stretch of the run.

    A ramp is the batch warm-up that most large language models had: linear in GPT-3 (Brown et al. 2020, arXiv
    2005.14165, appendix B), by doubling in OLMo (Merrill et al. 2025, arXiv 2505.23971) and Llama 3 (arXiv 2407.21783,
    section 3.4.1), which is a list of stages.

    Attributes:
        stages: the first starts at 0, starts rise, and the last has no ramp.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        assert self.stages[0].start == 0, f"a run begins before its first stage {self.stages[0]}"

    def decide(self, measurement: Measurement) -> Decision:
        """Ask for the batch at this position."""
        seen = measurement.samples_seen
        index = bisect_right(self.stages, seen, key=lambda stage: stage.start) - 1
        start, batch, last = self.stages[index]
        if last is None:
            return Decision(global_batch_size=batch, reason=f"schedule: {batch} from sample {start:,} on")
        end = self.stages[index + 1].start
        now = batch + (last - batch) * (seen - start) / (end - start)
        return Decision(global_batch_size=now, reason=f"schedule: ramp {batch} → {last}, sample {seen:,} of {end:,}")
