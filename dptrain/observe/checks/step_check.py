"""What is checked of each measured step: whether `.grad` is there, and is the average of what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.noise import SquaredNorms
from dptrain.observe.checks.gradient_checksum import (
    NUM_CHECKS,
    NUM_CHECKSUM_VALUES,
    GradientChecksum,
    combined_differs,
    common_factor,
)
from dptrain.observe.checks.reasons import DOUBTS, DropLog, Reason
from dptrain.observe.geometry.dual import DualGeometry
from dptrain.observe.reduction import on_device

_FLAGS = (
    Reason.REDUCED_TWICE,
    Reason.ADDED_LATE,
    Reason.UNFROZEN,
    *DOUBTS,
    Reason.NO_FORWARD,
    Reason.NO_GRADIENT,
    Reason.OUTSIDE,
)
"""What each rank sees of its own loop."""
NUM_CHECK_VALUES = len(_FLAGS) + 2 + NUM_CHECKSUM_VALUES

_JENSEN_TOLERANCE = 1e-3
"""Rounding of two norms in single precision is 1e-6 at most; in bfloat16 that of equal micro-batches is 4e-3."""
_ALIKE_IN_A_ROW = 5
"""Measured steps whose micro-batches have equal gradients on all ranks: fewer may be chance in a tiny data set."""
_RESTART = 1.9
"""Samples of a step, relative to the smallest consistent one, from which on a contradiction is a step begun anew."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the checks say of a step.

    Attributes:
        reason: why it is dropped; None where it is consistent.
        factor: by which `.grad` differed from the average, 1 where it did not.
    """

    reason: Reason | None = None
    factor: float = 1.0


class StepCheck:
    """Finds steps whose squared norms do not belong together, from numbers that ride on the meter's one reduction.

    Args:
        checksum: of the gradients.
        parameters: those that are measured.
        others: parameters of the model that were frozen when the meter was attached.
        present: returns the model's parameters at present; None where the wrapper exchanges them itself (FSDP2).
        group: over which gradients are averaged.
        whole: whether each rank's `.grad` is the whole combined gradient, so that all must be equal.
        exact: False where a communication hook loses information on purpose (PowerSGD), so that sums cannot agree.
    """

    def __init__(
        self,
        checksum: GradientChecksum,
        *,
        parameters: Sequence[nn.Parameter],
        others: Sequence[nn.Parameter] = (),
        present: Callable[[], Iterable[nn.Parameter]] | None = None,
        group: dist.ProcessGroup | None = None,
        whole: bool = True,
        exact: bool = True,
    ) -> None:
        self.checksum = checksum
        self.log = DropLog(group)
        self._parameters = parameters
        self._others = others
        self._present = present
        self._known = {id(p) for p in (*parameters, *others)}
        self._num_alike = 0
        self.doubts: set[Reason] = set()
        self._whole = whole
        self._exact = exact
        self._device = parameters[0].device
        self._smallest_samples = math.inf

    def forget(self) -> None:
        """Drop what was seen in the step under way."""
        self.doubts.clear()
        self.checksum.forget()

    def vector(self, *, announced: bool, outside: bool, repeated: bool, alike: Tensor | None = None) -> Tensor:
        """Return this rank's part, to be summed over the ranks: `NUM_CHECK_VALUES` float64.

        Args:
            announced: whether a micro-batch was seen since the last step.
            outside: whether a gradient came without one.
            repeated: whether the gradients were reduced more than once.
            alike: whether all micro-batches had the same gradient, a float64 scalar; None where there were not two.
        """
        missing = all(p.grad is None for p in self._parameters)
        flags = (
            float(repeated),
            float(self.checksum.added_late),
            float(self._others_are_trained()),
            *(float(reason in self.doubts) for reason in DOUBTS),
            float(not announced),
            float(missing),
            float(outside),
        )
        self.doubts.clear()
        checks = self.checksum.vector()
        values = (*flags, float(self.checksum.half_precision))
        alike = checks.new_zeros(1) if alike is None else alike.reshape(1)
        return torch.cat([on_device(values, device=self._device), alike, checks])

    def _others_are_trained(self) -> bool:
        """Say whether parameters get gradients that are not measured: unfrozen, added or replaced since."""
        if any(p.requires_grad for p in self._others):
            return True
        present = () if self._present is None else self._present()
        return any(id(p) not in self._known and p.requires_grad and p.grad is not None for p in present)

    def empty(self, *, with_dual: DualGeometry | None = None) -> Tensor:
        """Return the part of a rank that has none, with the dual norms that follow it."""
        num_values = NUM_CHECK_VALUES + (0 if with_dual is None else with_dual.num_values)
        return torch.zeros(num_values, dtype=torch.float64, device=self._device)

    def judge(self, values: Sequence[float], norms: SquaredNorms | None, *, ranks: float, divisor: float) -> Verdict:
        """Say what the sum over the ranks of `vector` shows; equal on all ranks.

        Args:
            values: that sum.
            norms: the step's squared norms.
            ranks: that took part.
            divisor: by what the wrapper divides the sum of the ranks' gradients.
        """
        flags = dict(zip(_FLAGS, values, strict=False))
        alike, checks = values[len(_FLAGS) + 1], values[len(_FLAGS) + 2 :]
        misplaced = self._misplaced(flags, ranks)
        if misplaced is not None:
            return self._unless_restarted(misplaced, norms)
        if norms is None or norms.num_small < 2:  # noqa: PLR2004 - two is what a difference needs
            return Verdict(reason=Reason.ONE_SMALL_BATCH)
        uninformative = self._uninformative(checks, norms, alike=alike >= ranks)
        if uninformative is not None:
            return Verdict(reason=uninformative)
        verdict = self._compared(checks, norms, half=values[len(_FLAGS)] > 0, ranks=ranks, divisor=divisor)
        if verdict.reason is None:
            self._smallest_samples = min(self._smallest_samples, norms.num_samples)
            return verdict
        outside = verdict.reason is Reason.CHANGED and flags[Reason.OUTSIDE] > 0
        return self._unless_restarted(Reason.OUTSIDE if outside else verdict.reason, norms)

    def _uninformative(self, checks: Sequence[float], norms: SquaredNorms, *, alike: bool) -> Reason | None:
        """Return why numbers that may well belong together say nothing of the noise."""
        if not all(map(math.isfinite, (*checks, norms.small, norms.large))):
            return Reason.NOT_FINITE
        if norms.small == 0 and norms.large == 0:
            return Reason.ALL_ZERO
        self._num_alike = self._num_alike + 1 if alike else 0
        return Reason.SAME_SAMPLES if self._num_alike >= _ALIKE_IN_A_ROW else None

    @staticmethod
    def _misplaced(flags: Mapping[Reason, float], ranks: float) -> Reason | None:
        """Return what the ranks saw of their own loops, where it says that the step was not one."""
        for reason in (Reason.REDUCED_TWICE, Reason.ADDED_LATE, Reason.UNFROZEN, *DOUBTS):
            if flags[reason] > 0:
                return reason
        # One rank without a gradient of its own may be a joined or an idle one; all of them are a misplaced call.
        for reason in (Reason.NO_FORWARD, Reason.NO_GRADIENT):
            if flags[reason] >= ranks:
                # Where there were micro-batches, gradients beside them may be a diagnosis that never reaches `.grad`.
                return Reason.OUTSIDE if flags[Reason.OUTSIDE] > 0 else reason
        return None

    def _unless_restarted(self, reason: Reason, norms: SquaredNorms | None) -> Verdict:
        """Take a contradiction in a step with the samples of several for gradients that were thrown away in it."""
        if norms is not None and norms.num_samples >= _RESTART * self._smallest_samples:
            return Verdict(reason=Reason.RESTARTED)
        return Verdict(reason=reason)

    def _compared(
        self, checks: Sequence[float], norms: SquaredNorms, *, half: bool, ranks: float, divisor: float
    ) -> Verdict:
        if not self._exact:
            return Verdict()
        self.checksum.half_precision = self.checksum.half_precision or half
        tolerance = self.checksum.tolerance()
        seen, magnitudes, combined, squares = (checks[i * NUM_CHECKS : (i + 1) * NUM_CHECKS] for i in range(4))
        seen, magnitudes = [x / divisor for x in seen], [x / divisor for x in magnitudes]
        combined, squares = [x / ranks for x in combined], [x / ranks for x in squares]
        if self._whole and combined_differs(combined, squares, magnitudes, tolerance=tolerance):
            return Verdict(reason=Reason.NOT_AVERAGED)
        factor = common_factor(seen, magnitudes, combined, tolerance=tolerance)
        if factor is None:
            return Verdict(reason=Reason.CHANGED)
        if norms.large > norms.small * factor**2 * (1 + _JENSEN_TOLERANCE + (tolerance if half else 0)):
            return Verdict(reason=Reason.JENSEN)
        return Verdict(factor=factor)
