"""The arithmetic of one optimizer step's batch: global batch = micro-batch × accumulation steps × world size."""

from __future__ import annotations

from dataclasses import dataclass

from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How one global batch is laid out over replicas and micro-steps.

    Attributes:
        micro_batch_size: samples in one forward–backward on one replica.
        accumulation_steps: micro-batches per replica per optimizer step, at least 1.
        world_size: number of replicas.
    """

    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "accumulation_steps", "world_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")

    @property
    def global_batch_size(self) -> int:
        """Samples in one optimizer step, all replicas together."""
        return self.micro_batch_size * self.accumulation_steps * self.world_size

    @classmethod
    def exactly(cls, *, global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchPlan:
        """Lay out `global_batch_size` with full micro-batches only.

        Raises:
            ConfigError: where micro-batch × world size does not divide it; the text names the nearest that fit.
        """
        quantum = micro_batch_size * world_size
        if quantum < 1 or global_batch_size < 1 or global_batch_size % quantum:
            below = max(quantum, global_batch_size // max(quantum, 1) * quantum)
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not reachable: micro_batch_size {micro_batch_size} × "
                f"world_size {world_size} = {quantum}, so it must be a multiple of {quantum}, "
                f"such as {below} or {below + quantum}"
            )
        return cls(
            micro_batch_size=micro_batch_size,
            accumulation_steps=global_batch_size // quantum,
            world_size=world_size,
        )
