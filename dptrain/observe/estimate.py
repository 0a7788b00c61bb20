"""From the sum of one step over all replicas to the running noise scale, whole and by group; sees no gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dptrain.errors import ObservationError
from dptrain.noise import (
    Moments,
    MomentSums,
    NoiseScale,
    PresentState,
    Smoothing,
    SquaredNorms,
    noise_scale,
    present_moments,
    present_updated,
    smoothed,
    unbiased_moments,
)
from dptrain.noise.drift import now_steps
from dptrain.noise.reuse import ReuseBias, ReuseState, reuse_bias, reuse_updated, reuse_warning, skipped
from dptrain.noise.scale import heavy_tails

NUM_SIZES = 6
"""Entries behind the squared norms in the vector of a step: c1, c2, V, K, ranks that took part, samples."""

NUM_SUMS = 2 + NUM_SIZES
"""Length of the vector of `Meter.local_sums` where there are no groups."""


@dataclass(frozen=True, kw_only=True)
class MeterState:
    """What a checkpoint must hold of a meter.

    Attributes:
        sums: of the window.
        steps_measured: since the start.
        steps_dropped: steps that said nothing.
        groups: the sums of each group's window.
        present: of the whole model at present.
        reuse: of the position in the epoch, where the data set's size is known.
    """

    sums: MomentSums
    steps_measured: int
    steps_dropped: int
    groups: Mapping[str, MomentSums] = field(default_factory=dict)
    present: PresentState = field(default_factory=PresentState)
    reuse: ReuseState = field(default_factory=ReuseState)


class Estimate:
    """Takes in steps and remembers what the noise scale at present and over the window follows from.

    Args:
        names: of the groups; empty for the whole model alone.
        world_size: number of replicas.
        smoothing: how fast the window forgets the past.
        level: confidence of the interval.
        population: samples in the data set if steps draw from it without replacement, see `unbiased_moments`.
    """

    def __init__(
        self,
        *,
        names: tuple[str, ...] = (),
        world_size: int,
        smoothing: Smoothing | None = None,
        level: float = 0.95,
        population: int | None = None,
    ) -> None:
        self._names = names
        self._world_size = world_size
        self._smoothing = smoothing or Smoothing()
        self._level = level
        self._population = population
        self._sums = MomentSums()
        self._group_sums = dict.fromkeys(names, MomentSums())
        self._steps_measured = 0
        self.steps_dropped = 0
        self._present = PresentState()
        self._reuse = ReuseState()
        self._last_samples = 0.0
        self._oversized = False
        self._reading: NoiseScale | None = None

    def absorb(self, sums: list[float], *, divisor: float | None = None) -> SquaredNorms | None:
        """Take in the sum over all replicas of one step.

        Args:
            sums: Σ‖g_k‖²v by group, ‖g‖² of each rank by group, then `NUM_SIZES` entries.
            divisor: by what the sum of the replicas' gradients was divided; the world size by default.

        Returns:
            The squared norms of the whole, or None for a step that was dropped, as one larger than the data set is.
        """
        small, large, sizes = self._parts(sums)
        divisor = self._world_size if divisor is None else divisor
        norms = self.norms_of(sums, divisor=divisor)
        moments = self._moments(norms)
        updated = self._updated(self._sums, moments)
        if moments is None or updated is self._sums:
            self.steps_dropped += 1
            self._reading = None
            self._count(sizes[-1])
            return None
        self._steps_measured += 1
        self._sums, self._reading = updated, None
        self._present = present_updated(self._present, moments)
        self._learn_reuse(moments)
        for name, part, whole in zip(self._names, small, large, strict=False):
            norms_of_group = _squared_norms(part, whole, sizes, divisor=divisor)
            self._group_sums[name] = self._updated(self._group_sums[name], self._moments(norms_of_group))
        return norms

    def norms_of(self, sums: list[float], *, divisor: float) -> SquaredNorms | None:
        """Return the squared norms of the whole of one step, without taking it in."""
        small, large, sizes = self._parts(sums)
        return _squared_norms(sum(small), sum(large), sizes, divisor=divisor)

    def _parts(self, sums: list[float]) -> tuple[list[float], list[float], list[float]]:
        num = max(len(self._names), 1)
        return sums[:num], sums[num : 2 * num], sums[2 * num :]

    def drop(self) -> None:
        """Count a step that is not taken in."""
        self.steps_dropped += 1
        self._reading = None
        self._count(self._last_samples)

    def skip(self) -> None:
        """Count a step that is not measured, which draws as many samples as the last one that was."""
        self._count(self._last_samples)

    def _count(self, num_samples: float) -> None:
        if self._population is not None and 0 < num_samples < math.inf:
            self._reuse = skipped(self._reuse, num_samples=num_samples)

    def _moments(self, norms: SquaredNorms | None) -> Moments | None:
        if norms is None:
            return None
        if self._population is not None and norms.num_samples > self._population:
            # Samples occur in it more than once: at 1.5 times the data set a true 500 would read 167, at 4 times 0.
            self._oversized = True
            return None
        return unbiased_moments(norms, population=self._population)

    def _updated(self, sums: MomentSums, moments: Moments | None) -> MomentSums:
        """Return the sums with one more step, or the very same ones where it says nothing that they could hold."""
        return sums if moments is None else self._smoothing.update(sums, moments)

    def _learn_reuse(self, moments: Moments) -> None:
        self._last_samples = moments.num_samples
        if self._population is not None:
            self._reuse = reuse_updated(
                self._reuse,
                grad_sq_norm=moments.grad_sq_norm,
                window_mean=self._sums.grad / self._sums.weight,
                num_samples=moments.num_samples,
                population=self._population,
            )

    def read(self) -> NoiseScale:
        """Return the noise scale of the whole model at present."""
        if self._reading is None:
            self._reading = noise_scale(
                present_moments(self._present),
                level=self._level,
                window=smoothed(self._sums),
                warnings=self._warnings(),
            )
        return self._reading

    def read_window(self) -> NoiseScale:
        """Return the noise scale of the means over the window, with their own interval."""
        return noise_scale(smoothed(self._sums), level=self._level)

    def reuse_bias(self) -> ReuseBias | None:
        """Return by how much |G|² is read too large because samples are used again; None where it is not known."""
        if self._population is None:
            return None
        return reuse_bias(self._reuse, present_samples=self._present_samples(), population=self._population)

    def _present_samples(self) -> float:
        return now_steps(self._present.steps) * self._last_samples

    def _warnings(self) -> tuple[str, ...]:
        trace = self._present.trace
        found = [None if trace is None else heavy_tails(trace.lone, num_steps=self._present.steps)]
        if self._population is not None:
            samples = self._present_samples()
            found.append(reuse_warning(self._reuse, present_samples=samples, population=self._population))
        if self._oversized:
            found.append(
                f"steps larger than the data set of {self._population} samples were not measured: lower the largest "
                "global batch, or give no `population` to a loader that draws with replacement"
            )
        return tuple(warning for warning in found if warning is not None)

    def read_groups(self) -> dict[str, NoiseScale]:
        """Return the noise scale of each group over the window: their moments add up to those of `read_window`."""
        return {name: noise_scale(smoothed(sums), level=self._level) for name, sums in self._group_sums.items()}

    @property
    def state(self) -> MeterState:
        """What a checkpoint must hold."""
        return MeterState(
            sums=self._sums,
            steps_measured=self._steps_measured,
            steps_dropped=self.steps_dropped,
            groups=dict(self._group_sums),
            present=self._present,
            reuse=self._reuse,
        )

    def restore(self, state: MeterState) -> None:
        """Go on from `state`.

        Raises:
            ObservationError: where it is the state of other groups.
        """
        if set(state.groups) != set(self._names):
            raise ObservationError(
                f"the saved meter has groups {sorted(state.groups)} and this one {sorted(self._names)}: attach with "
                "the same `groups`"
            )
        self._sums, self._reading = state.sums, None
        self._group_sums = {name: state.groups[name] for name in self._names}
        self._present, self._reuse = state.present, state.reuse
        self._last_samples = state.present.batch
        self._steps_measured = state.steps_measured
        self.steps_dropped = state.steps_dropped


def to_record(state: MeterState) -> dict[str, Any]:
    """Return `state` in the form that torch and the frameworks save."""
    return {
        "sums": state.sums.to_json(),
        "steps_measured": state.steps_measured,
        "steps_dropped": state.steps_dropped,
        "groups": {name: sums.to_json() for name, sums in state.groups.items()},
        "present": state.present.to_json(),
        "reuse": state.reuse.to_json(),
    }


def from_record(record: Mapping[str, Any]) -> MeterState:
    """Return the state that `to_record` wrote.

    Raises:
        ObservationError: for a record of something else.
    """
    try:
        return MeterState(
            sums=MomentSums.from_json(record["sums"]),
            steps_measured=int(record["steps_measured"]),
            steps_dropped=int(record["steps_dropped"]),
            groups={name: MomentSums.from_json(sums) for name, sums in record.get("groups", {}).items()},
            present=PresentState.from_json(record["present"]),
            reuse=ReuseState.from_json(record["reuse"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ObservationError(f"not the state of a meter: {error}") from error


def _squared_norms(small: float, large: float, sizes: list[float], *, divisor: float) -> SquaredNorms | None:
    """Turn the sums over all replicas into squared norms with their sizes.

    With weights v_k and V = Σ v_k the averaged gradient is (V/divisor)·Σ (v_k/V)·g_k.
    """
    inverse, inverse_square, weight, count, ranks, samples = sizes
    if weight <= 0 or ranks <= 0:
        return None
    return SquaredNorms(
        small=small / weight,
        # The mean over the ranks that took part is the square of the averaged gradient.
        large=large / ranks * (divisor / weight) ** 2,
        inverse_small=inverse / weight,
        inverse_large=inverse_square / (weight * weight),
        num_small=round(count),
        num_samples=samples,
    )
