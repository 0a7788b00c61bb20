"""The global batch of one optimizer step, divided among however many ranks there are; pure arithmetic, no samples.

Frameworks divide the batch by fixing the micro-batches of each rank. A run that loses a node then trains on another
global batch, and its data order changes. Here position and global batch are the state, and the ranks are an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from typing import Self

from dptrain.data.window import accumulation_steps, slots
from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMicroBatch:
    """One forward–backward of one rank.

    Attributes:
        position: of its first sample in the stream.
        num_samples: samples of the step in it; 0 marks a filler, see `positions`.
        is_last: whether the ranks combine their gradients after it; before that, run it under `no_sync`.
        global_batch_size: samples in the step, all ranks together.
        world_size: number of ranks that share the step.
    """

    position: int
    num_samples: int
    is_last: bool
    global_batch_size: int
    world_size: int

    @property
    def positions(self) -> range:
        """The positions to read, consecutive.

        A filler has one position past the step. The rank runs it with weight 0, so that its collectives match those
        of the other ranks.
        """
        return range(self.position, self.position + max(1, self.num_samples))

    @property
    def fraction(self) -> Fraction:
        """Its share of the step. The fractions of all micro-batches of all ranks sum to exactly 1."""
        return Fraction(self.num_samples, self.global_batch_size)

    @property
    def weight(self) -> float:
        """The factor on its mean loss that makes the gradient the mean over all samples of the step.

        For frameworks that average gradients over ranks, as DDP and FSDP do. Where gradients are summed over the
        ranks, multiply by `fraction` instead. Not 1 / accumulation steps: micro-batches may be uneven.
        """
        return self.num_samples * self.world_size / self.global_batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticBatch:
    """Which samples the next optimizer step sees, in how large micro-batches; independent of the number of ranks.

    The step sees the positions `position` … `position` + `global_batch_size` - 1. It is cut into micro-batches of at
    most `micro_batch_size`, whose sizes differ by at most one. The cut depends on no world size, so after a rank is
    lost or has joined, the others run the same micro-batches in another distribution. The four fields are the whole
    state: save them with a checkpoint, and replace the object after each step that was applied::

        batch = dptrain.ElasticBatch(global_batch_size=512, micro_batch_size=32)
        for micro in batch.micro_batches(rank=rank, world_size=world_size):
            with nullcontext() if micro.is_last else model.no_sync():
                (mean_loss(read(micro.positions)) * micro.weight).backward()
        optimizer.step()
        batch = batch.after_step()

    Attributes:
        global_batch_size: samples per optimizer step, all ranks together.
        micro_batch_size: largest number of samples in one forward–backward; keep it fixed to keep the cut fixed.
        position: samples consumed so far.
        steps_done: optimizer steps applied so far.

    Raises:
        ConfigError: where a field is no whole number in its range.
    """

    global_batch_size: int
    micro_batch_size: int
    position: int = 0
    steps_done: int = 0

    def __post_init__(self) -> None:
        for name, least in (("global_batch_size", 1), ("micro_batch_size", 1), ("position", 0), ("steps_done", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")

    def accumulation_steps(self, *, world_size: int) -> int:
        """Return the number of micro-batches that each rank runs in the step; the same on all ranks."""
        return accumulation_steps(
            global_batch_size=self.global_batch_size, micro_batch_size=self.micro_batch_size, world_size=world_size
        )

    def micro_batches(self, *, rank: int, world_size: int) -> tuple[RankMicroBatch, ...]:
        """Return this rank's micro-batches of the step, in order, `accumulation_steps` of them.

        The cost is that of this rank's micro-batches alone, whatever the world size.

        Raises:
            ConfigError: where `world_size` is below 1, or `rank` is not one of 0 … `world_size` - 1.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank must be one of 0 … world_size - 1, got rank {rank} of {world_size}")
        mine = slots(
            position=self.position,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            world_size=world_size,
            rank=rank,
        )
        return tuple(
            RankMicroBatch(
                position=slot.position,
                num_samples=slot.num_samples,
                is_last=slot is mine[-1],
                global_batch_size=self.global_batch_size,
                world_size=world_size,
            )
            for slot in mine
        )

    def after_step(self, *, global_batch_size: int | None = None) -> Self:
        """Return the state behind this step; a step that was not applied, as after a failure, is begun again instead.

        Args:
            global_batch_size: of the next step; None keeps it. The same on all ranks.
        """
        return replace(
            self,
            position=self.position + self.global_batch_size,
            steps_done=self.steps_done + 1,
            global_batch_size=self.global_batch_size if global_batch_size is None else global_batch_size,
        )

    def state_dict(self) -> dict[str, int]:
        """Return the state as four numbers by name, for any checkpoint format."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, int]) -> Self:
        """Return the object that `state_dict` was taken from.

        Raises:
            ConfigError: where a name is missing or unknown, or a value is out of range.
        """
        names = {field.name for field in fields(cls)}
        if set(state) != names:
            raise ConfigError(
                f"the state of an ElasticBatch has {', '.join(sorted(names))}, got {', '.join(sorted(map(str, state)))}"
            )
        return cls(**state)
