"""What a user gets from a step: the noise scale, whole and by group, and how it was measured."""

from __future__ import annotations

import math
from typing import Protocol

from dptrain.noise import NoiseScale


class Source(Protocol):
    """What a reading looks at when it is looked at."""

    @property
    def geometry(self) -> str:
        """The norm."""

    def read(self) -> NoiseScale:
        """Return the noise scale from all steps up to now."""

    def read_groups(self) -> dict[str, NoiseScale]:
        """Return the noise scale of each group."""

    @property
    def reason(self) -> str | None:
        """Why there is no number."""

    @property
    def identical_ranks(self) -> tuple[tuple[int, ...], ...]:
        """Ranks that were found to see the same samples."""


class Reading:
    """What is known after a step. Looking at it waits for the sums under way; not looking costs nothing.

    Attributes:
        measured: whether this very step was measured, or skipped to keep within the budget.
    """

    def __init__(self, source: Source, *, measured: bool = True) -> None:
        self._source = source
        self.measured = measured

    @property
    def noise_scale(self) -> NoiseScale:
        """The noise scale now, with its interval and the mean over the window (synchronises the device).

        Now is the mean over about the last 1 % of the measured steps, and 20 at least.
        """
        return self._source.read()

    @property
    def groups(self) -> dict[str, NoiseScale]:
        """The noise scale of each group over the window; their |G|² and tr(Σ) add up to those of the whole's window."""
        return self._source.read_groups()

    @property
    def geometry(self) -> str:
        """The norm: "sgd" for the plain one, "adam" for Adam's."""
        return self._source.geometry

    @property
    def identical_ranks(self) -> tuple[tuple[int, ...], ...]:
        """Sets of ranks whose gradients were equal but for rounding, so that the noise scale is too small."""
        return self._source.identical_ranks

    @property
    def reason(self) -> str | None:
        """Why there is no number yet, or why there can be none, with the remedy; None where there is one."""
        return self._source.reason

    def __str__(self) -> str:
        reason = self.reason
        return str(self.noise_scale) if reason is None else f"{self.noise_scale} ({reason})"

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats for any logger; what was not measured, and ends that are open, are left out.

        They stand under `noise_scale/…`, those of a group under `noise_scale/<group>/…`; under `noise_scale/adam/…`
        where the geometry is Adam's, so that numbers of different kinds never share a name.
        """
        prefix = "noise_scale" if self.geometry == "sgd" else f"noise_scale/{self.geometry}"
        found = _metrics(prefix, self.noise_scale)
        for name, scale in self.groups.items():
            found |= _metrics(f"{prefix}/{name}", scale)
        return found


def _metrics(prefix: str, scale: NoiseScale) -> dict[str, float]:
    if scale.num_steps == 0:
        return {}
    found = {
        f"{prefix}/value": scale.value,
        f"{prefix}/lower": scale.lower if scale.lower > 0 or scale.value is not None else None,
        f"{prefix}/upper": scale.upper,
        f"{prefix}/grad_sq": scale.grad_sq_norm,
        f"{prefix}/trace": scale.noise_trace,
        f"{prefix}/window_mean": scale.window_mean,
    }
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
