"""The law that follows a list written before the run: from this sample on, that batch."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from dptrain.control.base import Decision, Law, Measurement
from dptrain.errors import ConfigError

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_ENTRY = re.compile(r"(\d+)([KMBT]?):(\d+)", re.ASCII)


@dataclass(frozen=True)
class Schedule(Law):
    """A global batch for each stretch of the run.

    Attributes:
        stages: pairs (first sample, global batch size), both in samples; the first starts at 0, and starts rise.
    """

    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0:
            raise ConfigError(f"a batch schedule must start at sample 0, such as '0:768 250000:1536', got {starts}")
        if any(after <= before for before, after in pairwise(starts)):
            raise ConfigError(f"the starts of a batch schedule must rise, got {starts}")
        for start, batch in self.stages:
            if batch < 1:
                raise ConfigError(f"the batch from sample {start} on must be at least 1 sample, got {batch}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read Megatron's form: `"0:768 250K:1536"`, entries `start:batch` with spaces between them.

        A start may end in K, M, B or T (10³, 10⁶, 10⁹, 10¹²). It counts samples here; where Megatron is given
        a sequence length it counts tokens: divide those by the sequence length.

        Raises:
            ConfigError: for an entry that is not whole numbers in this form, or for starts that do not rise from 0.
        """
        return cls(tuple(_stage(entry, text=text) for entry in text.split()))

    def decide(self, measurement: Measurement) -> Decision:
        """Ask for the batch of the stage that holds the position."""
        index = bisect_right(self.stages, measurement.samples_seen, key=lambda stage: stage[0]) - 1
        start, batch = self.stages[index]
        return Decision(global_batch_size=batch, reason=f"schedule: {batch} from sample {start} on")


def _stage(entry: str, *, text: str) -> tuple[int, int]:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(
            f"cannot read {entry!r} in the batch schedule {text!r}: write start:batch in samples, "
            "such as '0:768 250K:1536'"
        )
    start, suffix, batch = match.groups()
    return int(start) * _SUFFIX[suffix], int(batch)
