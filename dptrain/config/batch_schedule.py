"""The text form of a batch schedule, that of Megatron: `"0:768 250K:1536"`, read and written."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise

from dptrain.control.schedule import Schedule, Stage
from dptrain.errors import ConfigError

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_ENTRY = re.compile(r"(\d+)([KMBT]?):(\d+)(?:\.\.(\d+))?", re.ASCII)
_EXAMPLE = "'0:768 250K:1536', or '0:64..1024 250K:1024' for a ramp"


def batch_schedule(text: str) -> Schedule:
    """Return the schedule that a text describes: entries `start:batch` with spaces between them.

    A start may end in K, M, B or T (10³, 10⁶, 10⁹, 10¹²). It counts samples here; where Megatron is given a sequence
    length it counts tokens: divide those by the sequence length. `start:batch..last` ramps in a straight line to `last`
    at the start of the next entry.

    Raises:
        ConfigError: for an entry that is not whole numbers in this form, a batch below 1, starts that do not rise from
            0, or a ramp without an end.
    """
    stages = tuple(_stage(entry, text=text) for entry in text.split())
    starts = [stage.start for stage in stages]
    if not starts or starts[0] != 0:
        raise ConfigError(f"a batch schedule must start at sample 0, such as {_EXAMPLE}, got {starts}")
    if any(after <= before for before, after in pairwise(starts)):
        raise ConfigError(f"the starts of a batch schedule must rise, got {starts}")
    for stage in stages:
        if min(stage.batch, 1 if stage.ramp_to is None else stage.ramp_to) < 1:
            raise ConfigError(f"the batch from sample {stage.start} on must be at least 1, got {stage.batch}")
    if stages[-1].ramp_to is not None:
        raise ConfigError(f"the last stage of a batch schedule has no end to ramp to: add one, such as {_EXAMPLE}")
    return Schedule(stages)


def converted(text: str, unit: Callable[[int], int]) -> str:
    """Return the text of a schedule with its positions and batches in another unit.

    Args:
        text: of the schedule.
        unit: from a number in the old unit to one in the new.
    """
    stages = []
    for start, batch, ramp_to in batch_schedule(text).stages:
        ramp = "" if ramp_to is None else f"..{unit(ramp_to)}"
        stages.append(f"{unit(start)}:{unit(batch)}{ramp}")
    return " ".join(stages)


def _stage(entry: str, *, text: str) -> Stage:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ConfigError(
            f"cannot read {entry!r} in the batch schedule {text!r}: write start:batch in samples, such as {_EXAMPLE}"
        )
    start, suffix, batch, last = match.groups()
    return Stage(int(start) * _SUFFIX[suffix], int(batch), None if last is None else int(last))
