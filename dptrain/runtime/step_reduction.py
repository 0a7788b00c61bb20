"""The one reduction of a step: what all replicas must agree on, tagged with the step it belongs to, read late."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.config.scaling_rules import BetaScaling
from dptrain.errors import AbortedError, DesyncError, DptrainError, PeerLostError
from dptrain.observe import NUM_SIZES, PendingSum
from dptrain.observe.measurement_interval import NUM_TIMINGS
from dptrain.observe.reduction import on_device
from dptrain.runtime.rendezvous import collective_timeout_s

Result = TypeVar("Result")
_POLL_S = 5.0
"""Between two questions whether all are done: one small reduction, and a last save ends within a second on most."""
_LONGEST_QUOTE = 300  # characters of what torch says, cut between words

_PEER_LOST = re.compile(r"gloo/transport|Connection (closed|reset)|(?<!DataLoader )timed? ?out|NCCL", re.IGNORECASE)
"""What gloo and NCCL say when the other side is gone; a loader that timed out is something else."""

_TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)

_TAGS = ("step", "position", "global_batch_size")
_FLAGS = (
    "stop",
    "save",
    "failed_saves",
    "folder_removed",
    "slow_ranks",
    "slow_rank",
    "slowness",
    "busy_s",
    "timed",
    "step_s",
    "energy_j",
)
_BAD = 2  # ranks whose own gradient was not finite, and the sum of their numbers
_OWN = ("halved", "measured", "num_samples")
_NUM_HOST = len(_TAGS) + len(_FLAGS) + len(_OWN)
# Then bad ranks, loss sum and squared norm of the combined gradient, and the meter's sums.


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one replica has to say to all others in a step, from its host.

    Attributes:
        stop: it was asked to stop.
        save: it was asked to save.
        failed_saves: checkpoints in a row that could not be written, on the replica that writes them; 0 on others.
        folder_removed: the run folder is gone, as the replica sees that writes to it.
        slowness: busy time to the mean of all, where this replica finds itself a straggler; 0 elsewhere.
        busy_s: seconds that it was busy by itself, in an earlier step.
        step_s: seconds from the beginning of the step before to that of this one; None where something else than
            training fell into them.
        energy_j: joules that its device drew since its last report; NaN where that is not known.
    """

    stop: bool = False
    save: bool = False
    failed_saves: int = 0
    folder_removed: bool = False
    slowness: float = 0.0
    busy_s: float = 0.0
    step_s: float | None = None
    energy_j: float = math.nan

    def values(self, *, rank: int) -> list[float]:
        """Return what is summed over the replicas; of one slow replica the sum of numbers is its number."""
        slow = self.slowness > 0
        return [
            *map(float, (self.stop, self.save, self.failed_saves, self.folder_removed, slow, slow * rank)),
            self.slowness,
            self.busy_s,
            float(self.step_s is not None),
            self.step_s or 0.0,
            self.energy_j,
        ]


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
        beta_scaling: of Adam's betas, where they follow the batch.
        decay_factor: on the weight decay of each parameter group, where it follows the batch.
        learning_rate_factor: that the rule of the learning rate has in it.
    """

    step: int
    position: int
    global_batch_size: int
    micro_batch_size: int
    learning_rate: float
    wall_s: float
    beta_scaling: BetaScaling | None = None
    decay_factor: float | None = None
    learning_rate_factor: float = 1.0

    @property
    def end(self) -> int:
        """Samples seen after it."""
        return self.position + self.global_batch_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in it, over all replicas."""
        return -(-self.global_batch_size // self.micro_batch_size)

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
        bad_ranks: how many replicas had a gradient of their own that was not finite.
        bad_rank: which, where it is one.
        stop: whether any replica was asked to stop.
        save: whether any was asked to save.
        failed_saves: checkpoints in a row that could not be written.
        folder_removed: whether the run folder is gone.
        slow_rank: the one straggler, if there is one.
        slowness: its busy time to the mean of all.
        busy_s: mean seconds that a replica was busy by itself.
        step_s: mean seconds that the step before this one took; None where any replica did not just train.
        energy_j: joules that all devices drew, up to this step; NaN where that of any is not known.
        halved: how many replicas had too little memory for their micro-batches, and took them in halves.
        measured: whether the meter measured the step.
        meter_sums: for `Meter.absorb_step`, where it did.
        parts: of the loss by name, means over all samples as the loss is.
    """

    loss: float
    grad_norm: float
    finite: bool
    bad_ranks: int
    bad_rank: int | None
    stop: bool
    save: bool
    failed_saves: int
    folder_removed: bool
    slow_rank: int | None
    slowness: float
    busy_s: float
    step_s: float | None
    energy_j: float
    halved: int
    measured: bool
    meter_sums: list[float]
    parts: Mapping[str, float] = field(default_factory=dict)


def send(
    record: StepRecord,
    *,
    report: RankReport,
    loss_sum: Tensor,
    num_samples: int,
    grad_norm: Tensor,
    meter_sums: Tensor,
    measured: bool,
    halved: bool = False,
    part_sums: Sequence[Tensor] = (),
) -> PendingSum:
    """Start the reduction of a step. A collective; does not wait.

    Args:
        record: the step.
        report: what this replica's host has to say.
        loss_sum: of this replica's samples.
        num_samples: of this replica.
        grad_norm: of the combined gradient, the same on all replicas.
        meter_sums: of this replica, from `Meter.close_step`.
        measured: from there too.
        halved: whether this replica had too little memory for its micro-batches.
        part_sums: as `loss_sum`, of the named parts of the loss; as many on each replica, in the same order.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    host = [float(getattr(record, tag)) for tag in _TAGS] + report.values(rank=rank)
    header = on_device([*host, float(halved), float(measured), float(num_samples)], device=meter_sums.device)
    found = torch.stack([loss_sum, grad_norm]).double()
    # The meter's sums begin with the squares of this replica's own gradients, by group; zeros where it did not measure.
    own = found[0] + meter_sums[: (len(meter_sums) - NUM_SIZES - NUM_TIMINGS) // 2].sum() if measured else found[0]
    # What is not finite is not zero less itself; `torch.isfinite` is four kernels.
    is_bad = (own - own).ne(0).double()
    bad = torch.stack([is_bad, is_bad * rank])
    parts = [torch.stack(list(part_sums)).double()] if part_sums else []
    return PendingSum(torch.cat([header, bad, found, *parts, meter_sums]))


def receive(pending: PendingSum, record: StepRecord, *, parts: Sequence[str] = ()) -> StepOutcome:
    """Wait for a step's reduction and check that every replica meant the same step.

    Args:
        pending: from `send`.
        record: the step.
        parts: names of the parts of the loss, in the order of their sums.

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
    flags = dict(zip(_FLAGS + _OWN, values[len(_TAGS) : _NUM_HOST], strict=True))
    if flags["measured"] not in (0, world_size):
        raise DesyncError(
            f"replicas disagree at step {record.step}: {flags['measured']:g} of {world_size} measured the noise scale"
        )
    num_bad, bad_number, loss_sum, norms, *rest = values[_NUM_HOST:]
    part_sums, meter_sums = rest[: len(parts)], rest[len(parts) :]
    grad_norm = norms / world_size
    return StepOutcome(
        loss=loss_sum / flags["num_samples"],
        grad_norm=grad_norm,
        finite=math.isfinite(grad_norm),
        bad_ranks=round(num_bad),
        bad_rank=round(bad_number) if num_bad == 1 else None,
        stop=flags["stop"] > 0,
        save=flags["save"] > 0,
        failed_saves=round(flags["failed_saves"]),
        folder_removed=flags["folder_removed"] > 0,
        slow_rank=round(flags["slow_rank"]) if flags["slow_ranks"] == 1 else None,
        slowness=flags["slowness"],
        busy_s=flags["busy_s"] / world_size,
        step_s=flags["step_s"] / world_size if flags["timed"] == world_size else None,
        energy_j=flags["energy_j"],
        halved=round(flags["halved"]),
        measured=flags["measured"] > 0,
        meter_sums=meter_sums,
        parts={name: total / flags["num_samples"] for name, total in zip(parts, part_sums, strict=True)},
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
        except Exception as caught:  # noqa: BLE001 - raised again below, after the others know
            error = caught
    (failed,) = PendingSum(torch.tensor([float(error is not None)], dtype=torch.float64, device=device)).read()
    if error is not None:
        raise error
    if failed:
        raise AbortedError("aborted: rank 0 failed (see its error)")
    return result


def wait_together(wait: Callable[[float], bool], *, device: torch.device, beat: Callable[[], None]) -> None:
    """Wait until each replica is done with something of its own, such as a write. A collective.

    It may take longer than a collective waits for a peer: those that are done ask the others every few seconds.

    Args:
        wait: waits for at most so many seconds, and returns whether this replica is done.
        device: where the collectives run.
        beat: called between two of them, for a watchdog.
    """
    longest_s = min(_POLL_S, collective_timeout_s() / 4)
    num_waiting = 1.0
    while num_waiting:
        is_done = wait(longest_s)
        (num_waiting,) = PendingSum(torch.tensor([float(not is_done)], dtype=torch.float64, device=device)).read()
        beat()


def broadcast_from_rank_0(values: Sequence[int], *, device: torch.device) -> list[int]:
    """Return rank 0's whole numbers on every replica; the others give none. A collective; waits."""
    (length,) = PendingSum(torch.tensor([float(len(values))], dtype=torch.float64, device=device)).read()
    vector = torch.tensor(list(values) or [0.0] * round(length), dtype=torch.float64, device=device)
    return [round(value) for value in PendingSum(vector).read()] if length else []


def summed(value: float, *, device: torch.device) -> float:
    """Return the sum of what each replica gives. A collective; waits."""
    (total,) = PendingSum(torch.tensor([value], dtype=torch.float64, device=device)).read()
    return total


@contextmanager
def translate_peer_errors(step: Callable[[], int]) -> Iterator[None]:
    """Turn what torch raises where a peer is gone, or does not answer, into one sentence.

    Args:
        step: returns the number of the latest step.

    Raises:
        PeerLostError: in place of torch's own.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DptrainError) or not _PEER_LOST.search(str(error)):
            raise
        waited = ""
        if _TIMED_OUT.search(str(error)):
            waited = f"; DPTRAIN_COLLECTIVE_TIMEOUT_S, now {collective_timeout_s():g}, is how many seconds it has"
        raise PeerLostError(
            f"another replica ended, or did not answer in time, after step {step():,}: its own message says "
            f"why{waited} ({textwrap.shorten(str(error).splitlines()[0], _LONGEST_QUOTE, placeholder=' …')})"
        ) from error
