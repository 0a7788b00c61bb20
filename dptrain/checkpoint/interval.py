"""How long to train between two checkpoints; pure."""

from __future__ import annotations

import math

_MAX_STALL_SHARE = 0.01


def young_daly_s(*, stall_s: float, write_s: float, mean_time_between_failures_s: float) -> float:
    """Return the seconds between two checkpoints that lose the least time to saving and to repeated work together.

    Saving every T seconds costs stall/T of the time; a failure costs T/2 of it on average, every M seconds. The sum is
    least at T = √(2·stall·M): J. W. Young, "A first order approximation to the optimum checkpoint interval",
    Communications of the ACM 17(9), 1974. J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
    restart dumps", Future Generation Computer Systems 22(3), 2006, adds terms that matter only where the stall is not
    small against M. It is small here, or the run makes no progress anyway, so Young's form is enough.

    Two bounds from below go with it: the interval is at least as long as a write takes, as a save that meets another
    under way is skipped; and the stall is at most 1 % of the time. The work lost while a write is under way is the same
    for every interval and moves nothing.

    Args:
        stall_s: how long a save holds up training (the copy), not how long its write takes.
        write_s: how long the write takes, beside training.
        mean_time_between_failures_s: of the whole job: that of one machine divided by their number.
    """
    assert stall_s >= 0, stall_s
    assert write_s >= 0, write_s
    assert mean_time_between_failures_s > 0, mean_time_between_failures_s
    return max(math.sqrt(2 * stall_s * mean_time_between_failures_s), write_s, stall_s / _MAX_STALL_SHARE)
