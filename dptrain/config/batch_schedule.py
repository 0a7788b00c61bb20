"""The text form of a batch schedule, that of Megatron: `"0:768 250K:1536"`, read and written."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal

from dptrain.config.counts import as_count
from dptrain.control.schedule import Schedule, Stage
from dptrain.errors import ConfigError

Unit = Literal["samples", "tokens"]
_ENTRY = re.compile(r"([^:]+):(.+?)(?:\.\.(.+))?")
_EXAMPLES: Mapping[Unit, str] = {
    "samples": "'0:768 250K:1536', or '0:64..1024 250K:1024' for a ramp",
    "tokens": "'0:64K 100M:128K', or '0:64K..512K 100M:512K' for a ramp",
}


def batch_schedule(text: str, *, unit: Unit = "samples") -> Schedule:
    """Return the schedule that a text describes: entries `start:batch` with spaces between them.

    Starts and batches are numbers as they may be written in all settings, such as 250K or 1.5M. They count samples, or
    all of them tokens. `start:batch..last` ramps in a straight line to `last` at the start of the next entry.

    Args:
        text: of the schedule.
        unit: of starts and batches, for the text of an error.

    Raises:
        ConfigError: for an entry that is not whole numbers in this form, a batch below 1, starts that do not rise from
            0, or a ramp without an end.
    """
    stages = tuple(_stage(entry, text=text, unit=unit) for entry in text.split())
    example, one = _EXAMPLES[unit], unit.removesuffix("s")
    starts = [stage.start for stage in stages]
    if not starts or starts[0] != 0:
        raise ConfigError(f"a batch schedule must start at {one} 0, such as {example}, got {starts}")
    if any(after <= before for before, after in pairwise(starts)):
        raise ConfigError(f"the starts of a batch schedule must rise, got {starts}")
    for stage in stages:
        if min(stage.batch, 1 if stage.ramp_to is None else stage.ramp_to) < 1:
            raise ConfigError(f"the batch from {one} {stage.start} on must be at least 1, got {stage.batch}")
    if stages[-1].ramp_to is not None:
        raise ConfigError(f"the last stage of a batch schedule has no end to ramp to: add one, such as {example}")
    return Schedule(stages)


def converted(text: str, in_samples: Callable[[int], int]) -> str:
    """Return the text of a schedule in tokens with its positions and batches in samples.

    Args:
        text: of the schedule.
        in_samples: from a number of tokens to one of samples.
    """
    stages = []
    for start, batch, ramp_to in batch_schedule(text, unit="tokens").stages:
        ramp = "" if ramp_to is None else f"..{in_samples(ramp_to)}"
        stages.append(f"{in_samples(start)}:{in_samples(batch)}{ramp}")
    return " ".join(stages)


def _stage(entry: str, *, text: str, unit: Unit) -> Stage:
    match = _ENTRY.fullmatch(entry)
    start, batch, last = (None if part is None else as_count(part) for part in match.groups()) if match else (None,) * 3
    if match is None or start is None or batch is None or (last is None) != (match[3] is None):
        raise ConfigError(
            f"cannot read {entry!r} in the batch schedule {text!r}: write start:batch in {unit}, such as "
            f"{_EXAMPLES[unit]}"
        )
    return Stage(start, batch, last)
