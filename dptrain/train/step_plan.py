"""What one step is made of: its window of samples, its micro-batches, its learning rate, betas and decay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dptrain.config.built import beta_scaling, decay_factor, learning_rate_schedule, micro_batch_size
from dptrain.config.filled_in import given, largest_micro_batch_size
from dptrain.config.train_config import TrainConfig
from dptrain.data import SampleStream, slots
from dptrain.errors import ConfigError
from dptrain.runtime.step_reduction import StepRecord
from dptrain.train.progress import Progress

_MAX_IDS = 16


class StepPlan:
    """Lays out each step from how far the run is; equal on all ranks.

    Args:
        config: filled in.
        world_size: number of replicas.
        stream: order of the training data.
        smallest_micro_batch: fewest samples that the model takes at a time.

    Raises:
        ConfigError: where the settings leave fewer.
    """

    def __init__(
        self, config: TrainConfig, *, world_size: int, stream: SampleStream, smallest_micro_batch: int = 1
    ) -> None:
        self.config = config
        self._smallest_micro_batch = smallest_micro_batch
        most = min(largest_micro_batch_size(config), given(config.max_samples))
        if most < smallest_micro_batch:
            raise ConfigError(
                f"the batch norms of the model, or its loss, need at least {smallest_micro_batch} samples at a time, "
                f"and micro_batch_size or max_samples leaves {most}: raise it"
            )
        self._world_size = world_size
        self._stream = stream
        self._schedule = learning_rate_schedule(config)

    def record(self, progress: Progress, *, wall_s: float) -> StepRecord:
        """Lay out the next step: the batch in force, or what is left of the run."""
        left, least = given(self.config.max_samples) - progress.position, self._smallest_micro_batch
        batch = min(progress.global_batch_size, left)
        if 0 < left - batch < least:
            batch = left  # too few for a step of their own
        micro = micro_batch_size(self.config, global_batch_size=progress.global_batch_size)
        # An odd rest in micro-batches of two would leave a single one: some take three.
        while batch // -(-batch // micro) < least:
            micro += 1
        base = given(self.config.optimizer.learning_rate) * self._schedule.factor(progress.position + batch)
        factor = progress.learning_rate_factor
        return StepRecord(
            step=progress.step + 1,
            position=progress.position,
            global_batch_size=batch,
            micro_batch_size=micro,
            learning_rate=base * factor,
            wall_s=wall_s,
            beta_scaling=beta_scaling(self.config, batch=progress.global_batch_size),
            decay_factor=decay_factor(self.config, batch=progress.global_batch_size, rate_factor=factor),
            learning_rate_factor=factor,
        )

    def limit_micro_batch(self, limit: int) -> None:
        """Lay out steps with micro-batches of at most `limit` samples from now on."""
        self.config = replace(self.config, micro_batch_size=min(limit, largest_micro_batch_size(self.config)))

    def epochs(self, position: int) -> float:
        """Return the passes over the data set up to a position."""
        return position / self._stream.num_samples

    def samples_of(self, record: StepRecord, *, rank: int) -> str:
        """Name the samples that a replica reads in a step, the first of them at least."""
        layout = slots(
            position=record.position,
            global_batch_size=record.global_batch_size,
            micro_batch_size=record.micro_batch_size,
            world_size=self._world_size,
            rank=rank,
        )
        positions = np.concatenate([np.arange(s.position, s.position + s.num_samples) for s in layout])
        indices = self._stream.indices(positions[:_MAX_IDS]).tolist()
        return f"samples {', '.join(map(str, indices))}{', …' if len(positions) > _MAX_IDS else ''}"
