"""The meter inside torch's Join: what is checked, and who answers for a rank that ran out of samples."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Joinable, JoinHook

from dptrain.errors import ObservationError


class Answering(Protocol):
    """What can stand in a step for a rank that has none."""

    def step_joined(self) -> None:
        """Answer one step of the ranks that go on; a collective where it is measured."""


class JoinedRank(JoinHook):
    """Answers for a rank without samples: it contributes zeros, and is not counted among the replicas."""

    def __init__(self, meter: Answering) -> None:
        self._meter = meter

    def main_hook(self) -> None:
        """Answer one step."""
        self._meter.step_joined()


class JoinableMeter(Joinable):
    """What torch's Join asks of a meter.

    Args:
        device: where its collectives run.
        group: over whom they run.
        accumulated: whether a replica's accumulated gradient is seen.
    """

    def __init__(self, *, device: torch.device, group: dist.ProcessGroup | None, accumulated: bool) -> None:
        super().__init__()
        self._join_device, self._join_group, self._join_accumulated = device, group, accumulated
        self.divides_by_active = False

    @abstractmethod
    def step_joined(self) -> None:
        """Answer one step of the ranks that go on; a collective where it is measured."""

    def join_hook(self, **kwargs: Any) -> JoinHook:  # noqa: ANN401 - torch hands every joinable the same arguments
        """Return what answers for a rank that ran out of samples."""
        self.divides_by_active = not kwargs.get("divide_by_initial_world_size", True)
        check_divisor(by_active=self.divides_by_active, accumulated=self._join_accumulated)
        return JoinedRank(self)

    @property
    def join_device(self) -> torch.device:
        """Where its collectives run."""
        return self._join_device

    @property
    def join_process_group(self) -> Any:  # noqa: ANN401 - torch leaves it without a type
        """Over whom they run."""
        return self._join_group


def check_model(model: nn.Module, *, meter: Joinable) -> None:
    """Raise inside a Join that does not know the meter: ranks without samples would not answer its reduction."""
    config = getattr(model, "_join_config", None)
    if config is not None and config.enable and not meter._join_config.enable:  # noqa: SLF001 - as DDP asks for its own
        raise ObservationError(
            "the model is inside Join but the meter is not, so ranks that run out of samples would not answer its "
            "reduction: write Join([model, meter])"
        )


def check_step(meter: Joinable, *, num_micro_batches: int) -> None:
    """Raise inside a Join in which a joined rank could not answer this step."""
    config = meter._join_config  # noqa: SLF001 - as DDP asks for its own
    if not config.enable:
        return
    if config.is_first_joinable:
        raise ObservationError("inside Join the model must come before the meter: Join([model, meter])")
    if num_micro_batches > 1:
        raise ObservationError(
            "inside Join each forward pass must be an optimizer step of its own, for a joined rank answers each "
            f"of them, but this step had {num_micro_batches} micro-batches: accumulate outside of Join"
        )


def check_divisor(*, by_active: bool, accumulated: bool) -> None:
    """Raise where a hook sees gradients that are divided by another number of ranks than those combined."""
    if by_active and accumulated:
        raise ObservationError(
            "divide_by_initial_world_size=False does not reach a communication hook, which divides by all ranks: "
            "leave it out, or measure with method='parameters'"
        )
