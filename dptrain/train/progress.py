"""How far a run is: the numbers that a checkpoint holds beside model, optimizer, meter and controller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, apart from model, optimizer, meter and controller. Exactly this is in a checkpoint.

    Attributes:
        step: optimizer steps done.
        position: samples seen, those before `start` included.
        start: position at which the run began: where the run that it branched off from was, else 0; None for a branch
            that an earlier version began.
        global_batch_size: for the next step.
        learning_rate_factor: of the rule, for the next step.
        steps_dropped: updates skipped for a gradient that was not finite.
        skipped_in_row: how many of the latest steps were.
        num_batch_changes: how often the batch changed.
        loss_first: of the first step.
        loss_last: of the latest step whose outcome is known.
        eval_loss: latest held-out loss.
        eval_figures: all figures of the latest evaluation, by name.
        wall_s: seconds of training, earlier attempts included.
        loss_mean: running mean of the training loss, decaying in samples.
        advised: batch of the latest advice, where decisions are not acted upon.
        micro_batch_limit: largest micro-batch that is known to fit, where one did not.
        ended_early: whether a hook ended the run.
    """

    step: int = 0
    position: int = 0
    start: int | None = 0
    global_batch_size: int
    learning_rate_factor: float
    steps_dropped: int = 0
    skipped_in_row: int = 0
    num_batch_changes: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    eval_loss: float | None = None
    eval_figures: Mapping[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    loss_mean: float | None = None
    advised: int | None = None
    micro_batch_limit: int | None = None
    ended_early: bool = False

    def updated(self, **changes: Any) -> Progress:  # noqa: ANN401 - the fields' own types
        """Return a copy with some fields changed: `dataclasses.replace` for each step, in a fifth of its time."""
        if unknown := changes.keys() - self.__dict__.keys():
            raise TypeError(f"Progress has no {', '.join(sorted(unknown))}")
        made = object.__new__(Progress)
        made.__dict__.update(self.__dict__, **changes)
        return made

    @property
    def samples_trained(self) -> int | None:
        """Samples of this run alone, which its steps and its time belong to; None where its start is not known."""
        return None if self.start is None else self.position - self.start
