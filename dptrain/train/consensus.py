"""The one reduction of a step: what all replicas must agree on, tagged with the step it belongs to, read late."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.errors import AbortedError, DesyncError
from dptrain.observe import NUM_SUMS, PendingSum

Result = TypeVar("Result")

_TAGS = ("step", "position", "global_batch_size")
# tags, stop flag, then loss sum, then the meter's sums, of which the last is the number of samples
_NUM_HOST = len(_TAGS) + 1
_LENGTH = _NUM_HOST + 1 + NUM_SUMS


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What the host knew of a step when it was begun; the same on all ranks.

    Attributes:
        step: number of the step, from 1.
        position: samples seen before it.
        global_batch_size: samples in it.
        micro_batch_size: largest micro-batch in it.
        learning_rate: in force.
        wall_s: seconds of training when its work was handed to the device.
    """

    step: int
    position: int
    global_batch_size: int
    micro_batch_size: int
    learning_rate: float
    wall_s: float

    @property
    def end(self) -> int:
        """Samples seen after it."""
        return self.position + self.global_batch_size

    def micro_steps(self, world_size: int) -> int:
        """Return the number of forward and backward passes on each replica."""
        return -(-self.global_batch_size // (self.micro_batch_size * world_size))


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What all replicas together found in a step.

    Attributes:
        loss: mean over all samples.
        grad_norm: of the combined gradient, before clipping.
        finite: whether the gradient was, and so whether the update was made.
        stop: whether any replica was asked to stop.
        meter_sums: for `Meter.absorb`.
    """

    loss: float
    grad_norm: float
    finite: bool
    stop: bool
    meter_sums: list[float]


def send(record: StepRecord, *, stop: bool, loss_sum: Tensor, meter_sums: Tensor) -> PendingSum:
    """Start the reduction of a step. A collective; does not wait."""
    host = [float(getattr(record, tag)) for tag in _TAGS] + [float(stop)]
    header = torch.tensor(host, dtype=torch.float64, device=meter_sums.device)
    return PendingSum(torch.cat([header, loss_sum.double().reshape(1), meter_sums]))


def receive(pending: PendingSum, record: StepRecord) -> StepOutcome:
    """Wait for a step's reduction and check that every replica meant the same step.

    Raises:
        DesyncError: where the tags do not add up: replicas are at different steps, positions or batches.
    """
    values = pending.read()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for tag, total in zip(_TAGS, values, strict=False):
        if total != world_size * getattr(record, tag):
            raise DesyncError(
                f"replicas disagree at step {record.step}: {tag} is {getattr(record, tag)} here, "
                f"but {total / world_size:g} on average over {world_size} replicas"
            )
    assert len(values) == _LENGTH, f"{len(values)} values in a vector of {_LENGTH}"
    meter_sums = values[_NUM_HOST + 1 :]
    sq_norm = meter_sums[1] / world_size
    return StepOutcome(
        loss=values[_NUM_HOST] / meter_sums[-1],
        grad_norm=math.sqrt(sq_norm) if sq_norm >= 0 else math.nan,
        finite=math.isfinite(sq_norm),
        stop=values[_NUM_HOST - 1] > 0,
        meter_sums=meter_sums,
    )


def on_rank_0(action: Callable[[], Result], *, rank: int, device: torch.device) -> Result | None:
    """Do something on rank 0 alone, and have every replica learn whether it failed. A collective; waits.

    Returns:
        What it returned, on rank 0; None on the others.

    Raises:
        Exception: what it raised, on rank 0; an `AbortedError` on the others, which would else wait for a dead peer.
    """
    result, error = None, None
    if rank == 0:
        try:
            result = action()
        except Exception as caught:  # noqa: BLE001 - raised again below, after the others were told
            error = caught
    (failed,) = PendingSum(torch.tensor([float(error is not None)], dtype=torch.float64, device=device)).read()
    if error is not None:
        raise error
    if failed:
        raise AbortedError("rank 0 failed and says why")
    return result
