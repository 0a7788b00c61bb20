"""What a meter has found: the noise scale, the reasons for none, and the state that a checkpoint holds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dptrain.noise import NoiseScale
from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck
from dptrain.observe.checks.reasons import DropLog, why_no_number
from dptrain.observe.estimate import Estimate, MeterState, from_record, to_record
from dptrain.observe.geometry.dual import DualGeometry
from dptrain.observe.loop.passes import ForwardPasses
from dptrain.observe.reading import Reading


class MeterResults:
    """Reads what was absorbed; each look waits for the sums under way.

    Args:
        estimate: from squared norms.
        drops: steps that gave none.
        duplicate_data_check: looks for replicas that are not independent.
        dual: from dual norms, which take the place of the squared ones.
    """

    @property
    @abstractmethod
    def geometry(self) -> str:
        """The norm."""

    _passes: ForwardPasses

    def __init__(
        self,
        *,
        estimate: Estimate,
        drops: DropLog,
        duplicate_data_check: DuplicateDataCheck | None,
        dual: DualGeometry | None,
    ) -> None:
        self._estimate = estimate
        self._drops = drops
        self._duplicate_data_check = duplicate_data_check
        self._dual = dual

    @abstractmethod
    def _absorb_up_to(self, num_left: int) -> None:
        """Take in all steps but the last `num_left`."""

    def read(self) -> NoiseScale:
        """Return the noise scale now; waits for the sums under way."""
        self._absorb_up_to(0)
        scale = self._estimate.read() if self._dual is None else self._dual.read()
        doubts = self._drops.doubts
        return replace(scale, warnings=(*scale.warnings, *doubts)) if doubts else scale

    def read_window(self) -> NoiseScale:
        """Return the noise scale of the means over the window; waits for the sums under way."""
        self._absorb_up_to(0)
        return self._estimate.read_window() if self._dual is None else self._dual.read()

    def read_groups(self) -> dict[str, NoiseScale]:
        """Return the noise scale of each group over the window; waits for the sums under way."""
        self._absorb_up_to(0)
        return self._estimate.read_groups() if self._dual is None else self._dual.read_groups()

    @property
    def reading(self) -> Reading:
        """What is known by now, as `step` returns it."""
        return Reading(self, measured=False)

    @property
    def reason(self) -> str | None:
        """Why there is no number, in a sentence with the remedy; None where there is one. Waits as `read` does."""
        return why_no_number(self.read(), self._drops)

    @property
    def num_passes(self) -> int:
        """Forward passes with gradients since the last step was closed, measured or not."""
        return self._passes.num

    @property
    def identical_ranks(self) -> tuple[tuple[int, ...], ...]:
        """Sets of ranks whose gradients were found equal but for rounding; waits for the sums under way."""
        self._absorb_up_to(0)
        return () if self._duplicate_data_check is None else self._duplicate_data_check.identical_ranks

    @property
    def steps_dropped(self) -> int:
        """Steps without a measurement: squared norms not finite, fewer than two small batches; waits as `read` does."""
        self._absorb_up_to(0)
        return self._estimate.steps_dropped

    def state(self) -> MeterState:
        """Return what a checkpoint must hold; waits for the sums under way."""
        self._absorb_up_to(0)
        return self._estimate.state

    def restore(self, state: MeterState) -> None:
        """Go on from `state`; the sums under way belong to what is left behind, and are waited for."""
        self._absorb_up_to(0)
        self._estimate.restore(state)

    def state_dict(self) -> dict[str, Any]:
        """Return `state` in the form that torch and the frameworks save."""
        record = to_record(self.state())
        return record if self._dual is None else {**record, "dual": self._dual.state()}

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.restore(from_record(record))
        if self._dual is not None:
            self._dual.restore(record.get("dual", {}))
