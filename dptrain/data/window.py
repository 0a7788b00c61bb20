"""Who does what in one optimizer step: a window of positions cut into micro-batches; pure arithmetic, no samples."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One forward–backward of one replica.

    Attributes:
        micro_step: 0 … accumulation steps-1 within the step.
        rank: the replica that does it.
        position: of its first sample in the stream.
        num_samples: contiguous samples from there on; 0 where the step has fewer samples than slots.
    """

    micro_step: int
    rank: int
    position: int
    num_samples: int


def accumulation_steps(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """The fewest micro-steps in which `world_size` micro-batches at a time hold the global batch.

    Raises:
        ConfigError: where one of the three is below 1.
    """
    if min(global_batch_size, micro_batch_size, world_size) < 1:
        raise ConfigError(
            f"a step needs at least one sample, a micro-batch of one and one replica, got global_batch_size "
            f"{global_batch_size}, micro_batch_size {micro_batch_size} and world_size {world_size}"
        )
    return -(-global_batch_size // (micro_batch_size * world_size))


def is_full(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> bool:
    """Whether every slot of the step holds exactly `micro_batch_size` samples."""
    return global_batch_size % (micro_batch_size * world_size) == 0


def slots(
    *, position: int, global_batch_size: int, micro_batch_size: int, world_size: int, rank: int
) -> tuple[Slot, ...]:
    """The slots of one rank for the step that sees `position` … `position` + `global_batch_size` - 1, in order.

    The window is divided into as few micro-batches as hold it, whose sizes differ by at most one, the larger first.
    That depends on no world size, so that a run resumed on other replicas computes the same micro-batches. They are
    dealt out in turn: slot number micro_step × world_size + rank is the micro-batch of that number, and an empty one
    where there is none, so that every replica does the same number of forward–backwards. The work is that of this
    rank's slots alone, whatever the world size.

    Raises:
        ConfigError: where a size is below 1.
    """
    num_micro_steps = accumulation_steps(
        global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, world_size=world_size
    )
    assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
    num_micro_batches = -(-global_batch_size // micro_batch_size)
    size, num_larger = divmod(global_batch_size, num_micro_batches)
    return tuple(
        Slot(
            micro_step=micro_step,
            rank=rank,
            position=position + min(number * size + min(number, num_larger), global_batch_size),
            num_samples=size + (number < num_larger) if number < num_micro_batches else 0,
        )
        for micro_step, number in enumerate(range(rank, num_micro_steps * world_size, world_size))
    )


def micro_batch_sizes(largest: int) -> tuple[int, ...]:
    """The micro-batch sizes a run may use, ascending: the powers of two up to `largest`, then `largest` itself.

    `largest` is a size also if it is not a power of two: it is the size that its user chose or measured, and a list
    that ends at 32 when 48 was asked for would give away a third of it. It costs one more compiled shape.

    Raises:
        ConfigError: where `largest` is below 1.
    """
    if largest < 1:
        raise ConfigError(f"the largest micro-batch must hold at least one sample, got {largest}")
    powers = tuple(2**exponent for exponent in range(largest.bit_length()))
    return powers if powers[-1] == largest else (*powers, largest)


@functools.lru_cache(maxsize=256)
def choose_micro_batch_size(*, global_batch_size: int, world_size: int, largest: int) -> int:
    """The largest size whose full micro-batches make up the global batch.

    Where the world size does not divide the batch, no size does; then the largest that is no more than one replica's
    share, rounded up, and some replicas have a micro-batch fewer.

    Raises:
        ConfigError: where a size is below 1.
    """
    share = accumulation_steps(global_batch_size=global_batch_size, micro_batch_size=1, world_size=world_size)
    grid_points = [grid_point for grid_point in micro_batch_sizes(largest) if grid_point <= share]
    full = [
        grid_point
        for grid_point in grid_points
        if is_full(global_batch_size=global_batch_size, micro_batch_size=grid_point, world_size=world_size)
    ]
    return max(full or grid_points)
