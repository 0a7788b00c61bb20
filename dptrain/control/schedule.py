"""The laws that measure nothing: a constant batch, and a list written before the run, of batches and ramps."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from dptrain.control.base import Decision, Law, Measurement
from dptrain.errors import ConfigError

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_ENTRY = re.compile(r"(\d+)([KMBT]?):(\d+)(?:\.\.(\d+))?", re.ASCII)
_EXAMPLE = "'0:768 250K:1536', or '0:64..1024 250K:1024' for a ramp"


@dataclass(frozen=True)
class Constant(Law):
    """One global batch from the first sample to the last.

    Attributes:
        global_batch_size: in samples.
    """

    global_batch_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ConfigError(f"global_batch_size must be at least 1 sample, got {self.global_batch_size}")

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
        object.__setattr__(self, "stages", tuple(Stage(*stage) for stage in self.stages))
        starts = [stage.start for stage in self.stages]
        if not starts or starts[0] != 0:
            raise ConfigError(f"a batch schedule must start at sample 0, such as {_EXAMPLE}, got {starts}")
        if any(after <= before for before, after in pairwise(starts)):
            raise ConfigError(f"the starts of a batch schedule must rise, got {starts}")
        for stage in self.stages:
            if min(stage.batch, 1 if stage.ramp_to is None else stage.ramp_to) < 1:
                raise ConfigError(f"the batch from sample {stage.start} on must be at least 1, got {stage.batch}")
        if self.stages[-1].ramp_to is not None:
            raise ConfigError(f"the last stage of a batch schedule has no end to ramp to: add one, such as {_EXAMPLE}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read Megatron's form: `"0:768 250K:1536"`, entries `start:batch` with spaces between them.

        A start may end in K, M, B or T (10³, 10⁶, 10⁹, 10¹²). It counts samples here; where Megatron is given a
        sequence length it counts tokens: divide those by the sequence length. `start:batch..last` ramps in a straight
        line to `last` at the start of the next entry.

        Raises:
            ConfigError: for an entry that is not whole numbers in this form, or for starts that do not rise from 0.
        """
        return cls(tuple(_stage(entry, text=text) for entry in text.split()))

    @classmethod
    def doubling(cls, *, first: int, last: int, num_samples: int) -> Schedule:
        """Return a ramp by doublings (or halvings) over equal numbers of samples; the last stage has `last`.

        Args:
            first: batch at the start, in samples.
            last: batch after the ramp, in samples.
            num_samples: length of the ramp.

        Raises:
            ConfigError: where a number is below 1, or the ramp is too short for its stages.
        """
        if min(first, last, num_samples) < 1:
            raise ConfigError(f"a ramp needs numbers of at least 1, got {first}, {last} and {num_samples}")
        count = math.ceil(abs(math.log2(last / first)) - 1e-9)
        factor = 2 if last > first else 0.5
        ramp = [Stage(num_samples * k // max(count, 1), round(first * factor**k)) for k in range(count)]
        return cls((*ramp, Stage(num_samples if count else 0, last)))

    @property
    def batches(self) -> tuple[int, ...]:
        """All batches that are written in it, in their order."""
        return tuple(batch for stage in self.stages for batch in (stage.batch, stage.ramp_to) if batch is not None)

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


def _stage(entry: str, *, text: str) -> Stage:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(
            f"cannot read {entry!r} in the batch schedule {text!r}: write start:batch in samples, such as {_EXAMPLE}"
        )
    start, suffix, batch, last = match.groups()
    return Stage(int(start) * _SUFFIX[suffix], int(batch), None if last is None else int(last))
