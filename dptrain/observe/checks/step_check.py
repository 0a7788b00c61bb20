"""What is checked of each measured step: whether `.grad` is there, and is the average of what was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.noise import SquaredNorms
from dptrain.observe.checks.common_factor import combined_differs, common_factor, with_reduction
from dptrain.observe.checks.exchangeability import MIXED, Exchangeability, halves
from dptrain.observe.checks.gradient_checksum import NUM_CHECKS, NUM_CHECKSUM_VALUES, GradientChecksum
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
_NUM_BEFORE = len(_FLAGS) + 2
_NUM_CONTRASTS = 2 + NUM_CHECKS
NUM_CHECK_VALUES = _NUM_BEFORE + NUM_CHECKSUM_VALUES + _NUM_CONTRASTS

_JENSEN_TOLERANCE = 1e-3
"""Rounding of two norms in single precision is 1e-6 at most."""
_JENSEN_TOLERANCE_HALF = 1e-2
"""In bfloat16 that of equal micro-batches is 4e-3."""
_SINGLE = 1e-6
"""Unit roundoff from which on a format has less than single precision."""
_JENSEN_ERRORS = 8.0
"""Standard errors of the factor that is divided out."""
_ALIKE = 2e-6
"""Relative difference of squared norms below which micro-batches hold the same samples, in whatever order."""
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
        rescaled: whether that is more than rounding explains.
    """

    reason: Reason | None = None
    factor: float = 1.0
    rescaled: bool = False


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
        if not exact:
            checksum.compare_with_reduced()
        self._group = group
        self._rescales = False
        self._device = parameters[0].device
        self._smallest_samples = math.inf
        self._exchangeability = Exchangeability()
        self._number = 0

    def forget(self) -> None:
        """Drop what was seen in the step under way."""
        self.doubts.clear()
        self.checksum.forget()

    def vector(
        self, *, announced: bool, outside: bool, repeated: bool, several: tuple[Tensor | None, bool] = (None, False)
    ) -> Tensor:
        """Return this rank's part, to be summed over the ranks: `NUM_CHECK_VALUES` float64.

        Args:
            announced: whether a micro-batch was seen since the last step.
            outside: whether a gradient came without one.
            repeated: whether the gradients were reduced more than once.
            several: squared norms of the micro-batches by group, None where there were not two; and whether they are of
                equal size and weight.
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
        squares, are_equal = several
        contrasts = self._contrasts(squares if are_equal else None)
        ranks = dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1
        checks = self.checksum.vector(num_ranks=ranks)
        values = (*flags, self.checksum.roundoff)
        alike = checks.new_zeros(1) if squares is None else _are_alike(squares)
        return torch.cat([on_device(values, device=self._device), alike, checks, contrasts])

    def _contrasts(self, squares: Tensor | None) -> Tensor:
        """Return (difference and sum of squared norms, differences of checksums) between two sets of micro-batches."""
        self._expect()
        if squares is None:
            return torch.zeros(_NUM_CONTRASTS, dtype=torch.float64, device=self._device)
        first, second = halves(len(squares), number=self._number)
        totals = squares.sum(1)
        sums = [totals[places.start : places.stop : places.step].sum() for places in (first, second)]
        norms = torch.stack([sums[0] - sums[1], sums[0] + sums[1]])
        return torch.cat([norms, self.checksum.contrast(first, second)])

    def _expect(self) -> None:
        """Know what this measured step's contrasts are of: equal on all ranks."""
        self._number += 1
        self._exchangeability.expect([(self._number % 2, key) for key in (None, *self.checksum.keys)])

    def _others_are_trained(self) -> bool:
        """Say whether parameters get gradients that are not measured: unfrozen, added or replaced since."""
        if any(p.requires_grad for p in self._others):
            return True
        present = () if self._present is None else self._present()
        return any(id(p) not in self._known and p.requires_grad and p.grad is not None for p in present)

    def empty(self, *, with_dual: DualGeometry | None = None) -> Tensor:
        """Return the part of a rank that has none, with the dual norms that follow it."""
        self._expect()
        num_values = NUM_CHECK_VALUES + (0 if with_dual is None else with_dual.num_values)
        return torch.zeros(num_values, dtype=torch.float64, device=self._device)

    def judge(self, values: Sequence[float], norms: SquaredNorms | None, *, ranks: float, divisor: float) -> Verdict:
        """Say what the sum over the ranks of `vector` shows; equal on all ranks.

        It is called once for each `vector` or `empty`, in their order.

        Args:
            values: that sum.
            norms: the step's squared norms.
            ranks: that took part.
            divisor: by what the wrapper divides the sum of the ranks' gradients.
        """
        verdict = self._verdict(values[:-_NUM_CONTRASTS], norms, ranks=ranks, divisor=divisor)
        magnitudes = values[_NUM_BEFORE + NUM_CHECKS : _NUM_BEFORE + 2 * NUM_CHECKS]
        difference, total, *linear = values[-_NUM_CONTRASTS:]
        pairs = zip((difference, *linear), (total, *magnitudes), strict=True)
        contrasts = [x / size if size else 0.0 for x, size in pairs]
        if self._exchangeability.judge(contrasts, valid=verdict.reason is None):
            self.log.doubt(MIXED)
        return verdict

    def _verdict(self, values: Sequence[float], norms: SquaredNorms | None, *, ranks: float, divisor: float) -> Verdict:
        flags = dict(zip(_FLAGS, values, strict=False))
        alike, checks = values[len(_FLAGS) + 1], values[_NUM_BEFORE:]
        misplaced = self._misplaced(flags, ranks)
        if misplaced is not None:
            return self._unless_restarted(misplaced, norms)
        if norms is None or norms.num_small < 2:  # noqa: PLR2004 - two is what a difference needs
            return Verdict(reason=Reason.ONE_SMALL_BATCH)
        uninformative = self._uninformative(checks, norms, alike=alike >= ranks)
        if uninformative is not None:
            return Verdict(reason=uninformative)
        verdict = self._compared(checks, norms, roundoff=values[len(_FLAGS)] / ranks, ranks=ranks, divisor=divisor)
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
        self, checks: Sequence[float], norms: SquaredNorms, *, roundoff: float, ranks: float, divisor: float
    ) -> Verdict:
        parts = (checks[i * NUM_CHECKS : (i + 1) * NUM_CHECKS] for i in range(5))
        seen, _, variances, combined, squares = parts
        seen, variances = [x / divisor for x in seen], [x / divisor**2 for x in variances]
        variances = with_reduction(seen, variances, roundoff=roundoff, ranks=ranks)
        combined, squares = [x / ranks for x in combined], [x / ranks for x in squares]
        if self._exact and self._whole and combined_differs(combined, squares, seen, variances):
            return Verdict(reason=Reason.NOT_AVERAGED)
        found = common_factor(seen, variances, combined)
        if found is None:
            return Verdict(reason=Reason.CHANGED)
        self._rescales = self._rescales or found.rescales
        # Where other steps of the loop were rescaled this one was too, though none of its checks can tell.
        if not found.resolved and (self._rescales or not found.agrees):
            return Verdict(reason=Reason.UNRESOLVED)
        factor, error = (found.value, found.error) if found.resolved else (1.0, 0.0)
        tolerance = _JENSEN_TOLERANCE + (_JENSEN_TOLERANCE_HALF if roundoff > _SINGLE else 0) + _JENSEN_ERRORS * error
        if self._exact and norms.large > norms.small * factor**2 * (1 + tolerance):
            return Verdict(reason=Reason.JENSEN)
        return Verdict(factor=factor, rescaled=found.rescales)


def _are_alike(squares: Tensor) -> Tensor:
    """Return whether all micro-batches have the same gradient, as one float64 of 1 or 0."""
    same = (squares - squares[0]).abs() <= _ALIKE * squares[0]
    return (same.all() & (squares[0] > 0).any()).double().reshape(1)
