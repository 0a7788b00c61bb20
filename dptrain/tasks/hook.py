"""What a user's own code is called with while a run goes on; nothing here does anything by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a run is; the same on all replicas.

    Attributes:
        step: optimizer steps taken.
        samples_seen: training samples seen.
        global_batch_size: samples in the latest step.
        model: not wrapped; reading its parameters is allowed, changing them is not.
    """

    step: int
    samples_seen: int
    global_batch_size: int
    model: nn.Module


class TrainHook:
    """Is told of steps, evaluations and saves. Derive from it and override what is needed; all of it runs on all ranks.

    It must do the same on each rank. What it remembers goes through `state_dict`, or a resumed run lacks it.
    """

    def on_step(self, moment: Moment) -> None:
        """After an optimizer step was handed to the device. Reading a tensor's value here makes the host wait."""

    def on_evaluation(self, moment: Moment, figures: Mapping[str, float]) -> bool:  # noqa: ARG002 - overridden
        """After an evaluation, with its figures by name (`loss`, …). Return True to end the run here, as at its end."""
        return False

    def on_save(self, moment: Moment) -> None:
        """Before a checkpoint is packed, on rank 0 alone where it is an intermediate one."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what a checkpoint shall hold of it: numbers, texts, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""


class Hooks(TrainHook):
    """Several hooks as one, called in their order.

    Args:
        members: may be none.
    """

    def __init__(self, members: Sequence[TrainHook]) -> None:
        self._members = tuple(members)

    def on_step(self, moment: Moment) -> None:
        """Call each."""
        for member in self._members:
            member.on_step(moment)

    def on_evaluation(self, moment: Moment, figures: Mapping[str, float]) -> bool:
        """Call each, and return whether any wants to end the run."""
        wishes = [bool(member.on_evaluation(moment, figures)) for member in self._members]
        return any(wishes)

    def on_save(self, moment: Moment) -> None:
        """Call each."""
        for member in self._members:
            member.on_save(moment)

    def state_dict(self) -> Mapping[str, Any]:
        """Return the states by the classes' names and places."""
        return {f"{place}/{type(member).__name__}": member.state_dict() for place, member in enumerate(self._members)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give each its own; one that a checkpoint does not know begins anew."""
        for place, member in enumerate(self._members):
            name = f"{place}/{type(member).__name__}"
            if name in state:
                member.load_state_dict(state[name])
