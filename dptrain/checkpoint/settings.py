"""The settings of `checkpoint`: when the state of a run is saved."""

from __future__ import annotations

from dataclasses import dataclass

from dptrain.ranges import AT_LEAST_1, POSITIVE, setting


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of the run is saved."""

    every_samples: int | None = setting(None, AT_LEAST_1)
    """Samples between two checkpoints. Default: as often as pays, by what a checkpoint costs and how often runs fail.
    One is always written at the end."""
    every_tokens: int | None = setting(None, AT_LEAST_1)
    """Tokens between two checkpoints, in place of every_samples."""
    hours_between_failures: float = setting(24.0, POSITIVE)
    """How long the whole run goes on without a failure, on average; decides how often saving pays."""
    keep: int = setting(3, AT_LEAST_1)
    """How many are kept."""
