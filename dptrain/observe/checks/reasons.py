"""Why a step gave no noise scale: the reasons with their remedies, their counts, and the one warning."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import torch.distributed as dist

from dptrain.noise import NoiseScale, Resolution

_DROPS_BEFORE_WARNING = 5
"""Dropped steps in a row before the warning. A GradScaler that starts at 65,536 overflows in its first one to three."""
_MISUSES_BEFORE_WARNING = 2
"""Contradictions before the warning: a single one may come from an interrupted step that was retried."""


class Reason(StrEnum):
    """Why a measured step was dropped."""

    ONE_SMALL_BATCH = (
        "the step has one small batch, so there is nothing to compare: accumulate at least two micro-batches, train on "
        "several replicas, or call meter.split(loss_of, *batch) in one process"
    )
    NOT_FINITE = "the gradients are not finite (NaN or inf)"
    ALL_ZERO = "the gradients are all zero"
    NO_GRADIENT = (
        "no trained parameter has a .grad at meter.step(): call it after the last backward() and before "
        "optimizer.zero_grad()"
    )
    NO_FORWARD = (
        "no forward pass with a backward pass was seen since the last step: call meter.step() once per optimizer step, "
        "after backward(), and the module that was given to attach"
    )
    OUTSIDE = (
        "gradients came from a forward pass that did not go through the module given to attach, such as "
        "ddp.module(x): call the wrapped module, or announce the micro-batch by meter.begin(num_samples=...)"
    )
    REDUCED_TWICE = (
        "DDP synchronised more than once in this step, so its buckets mixed the replica's own gradient with an "
        "average: put all but the last micro-batch under model.no_sync(), or use method='parameters'"
    )
    ADDED_LATE = (
        "a backward pass added to .grad after DDP had reduced it, such as a regulariser's own backward(): add it to "
        "the loss, and call backward() once"
    )
    CHANGED = (
        ".grad is not the mean of the micro-batches' gradients: it holds gradients of earlier steps (zero_grad() of an "
        "optimizer that has only some of the parameters), or was changed unevenly before meter.step(). Call "
        "model.zero_grad() before each step and meter.step() before the gradients are changed"
    )
    NOT_AVERAGED = (
        ".grad differs between the ranks, so it was not averaged: run the step's last backward pass outside of "
        "no_sync() and through the wrapped module, or attach with reduction='optimizer'"
    )
    JENSEN = (
        "the combined gradient is longer than the mean of the micro-batches' gradients, which an average never is: "
        "call model.zero_grad() before each step, and meter.step() once per optimizer step"
    )
    RESCALED = (
        "the gradients were clipped or unscaled before the step was closed, which the sign and spectral geometries "
        "cannot take out: call meter.step() right after the last backward()"
    )
    UNRESOLVED = (
        "the gradients were clipped or unscaled before the step was closed, by a factor that rounding hides (many "
        "micro-batches or ranks added up in 16 bits, or parameters of which none of those looked at had a gradient): "
        "call meter.step() right after the last backward()"
    )
    SEVERAL_PASSES = (
        "one backward pass went through several forward passes of the model, whose samples may be parts of the same or "
        "more of them: give attach(..., micro_batch_size=), the samples that one backward pass is the mean over"
    )
    OTHER_ROWS = (
        "the model's output has other rows than its inputs (pooled nodes or views, one sample without a batch "
        "dimension, features first), so that the inputs' first dimension may not be the batch: give "
        "attach(..., micro_batch_size=), a number or a function of the model's arguments"
    )
    EMPTY_BATCH = "a micro-batch had no samples: skip it, or announce it by meter.begin(num_samples=1, weight=0)"
    SAME_SAMPLES = (
        "the micro-batches of each step have the same gradients but for rounding: they hold the same samples, so there "
        "is no noise to see; draw samples for each micro-batch, or call meter.discard_step() where the gradients of a "
        "first pass are thrown away (SAM)"
    )
    RESTARTED = "the gradients were cleared in the middle of the step, which began anew (no misuse)"
    UNFROZEN = (
        "parameters were unfrozen, added or replaced after attach, and are not measured: call meter.remove() and "
        "attach again, with load_state_dict(meter.state_dict()) to go on"
    )


DOUBTS = (Reason.SEVERAL_PASSES, Reason.OTHER_ROWS, Reason.EMPTY_BATCH)
"""What the forward passes of a step tell of their sizes."""
_HARMLESS = frozenset(
    {Reason.ONE_SMALL_BATCH, Reason.EMPTY_BATCH, Reason.NOT_FINITE, Reason.ALL_ZERO, Reason.RESTARTED}
)


class DropLog:
    """Counts dropped steps by reason, equally on all ranks, and warns once on rank 0.

    Args:
        group: over which gradients are averaged.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._in_a_row = 0
        self._warned: set[Reason] = set()
        self.doubts: tuple[str, ...] = ()
        self.not_closed: str | None = None
        self._warned_of_steps = False
        self.counts: Counter[Reason] = Counter()

    def measured(self) -> None:
        """Note a step that was measured."""
        self._in_a_row = 0

    def dropped(self, reason: Reason) -> None:
        """Note a step that was dropped; warn where it is no accident any more."""
        self.counts[reason] += 1
        self._in_a_row += 1
        if reason is Reason.RESTARTED or reason in self._warned:
            return
        harmless = reason in _HARMLESS
        enough = self._in_a_row >= _DROPS_BEFORE_WARNING if harmless else self.counts[reason] >= _MISUSES_BEFORE_WARNING
        if enough:
            self._warned.add(reason)
            self._warn(f"{self.counts[reason]} steps were not measured: {reason}")

    def doubt(self, sentence: str) -> None:
        """Note what makes all numbers doubtful, though no step was dropped for it; warn of it."""
        self.doubts = (*self.doubts, sentence)
        self._warn(sentence)

    def unclosed(self, sentence: str | None) -> None:
        """Note why no step is closed any more, and warn of it once; None where one is."""
        self.not_closed = sentence
        if sentence is not None and not self._warned_of_steps:
            self._warned_of_steps = True
            self._warn(sentence)

    def _warn(self, sentence: str) -> None:
        if not dist.is_available() or not dist.is_initialized() or dist.get_rank(self._group) == 0:
            warnings.warn(f"noise scale: {sentence}", stacklevel=1)

    def summary(self) -> str | None:
        """Return the most frequent reason with its count; None where no step was dropped."""
        if not self.counts:
            return None
        reason, count = self.counts.most_common(1)[0]
        return f"{count} of {self.counts.total()} dropped steps: {reason}"


def reason_of_dropped(sums: Sequence[float], *, num_entries: int) -> Reason:
    """Return why a step whose checks found nothing gave no estimate.

    Args:
        sums: of the step, as in `Estimate.absorb`.
        num_entries: squared norms that describe one gradient.
    """
    if sums[2 * num_entries + 3] < 2:  # noqa: PLR2004 - two is what a difference needs
        return Reason.ONE_SMALL_BATCH
    return Reason.NOT_FINITE if any(sums[: 2 * num_entries]) else Reason.ALL_ZERO


def why_no_number(scale: NoiseScale, drops: DropLog) -> str | None:
    """Return in a sentence, with the remedy, why there is no noise scale; None where there is one."""
    if scale.state in (Resolution.RESOLVED, Resolution.AT_LEAST):
        return None
    if scale.state is Resolution.INCONSISTENT:
        return (
            "tr(Σ) is far below zero, which no independent small batches give: check that the sizes and weights of the "
            "micro-batches are the true ones, and that meter.step() sees the gradients of its own step"
        )
    if drops.not_closed is not None:
        return drops.not_closed
    dropped = drops.summary()
    if scale.num_steps == 0 and dropped is not None:
        return dropped
    steps = f"too early: {scale.num_steps} steps measured"
    return steps if dropped is None else f"{steps}; {dropped}"
