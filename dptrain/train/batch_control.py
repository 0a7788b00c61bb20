"""The batch of a run: asks the adapter after each step, follows decisions on record, and logs what changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dptrain.config.built import beta_scaling, controller, tuned_betas
from dptrain.config.filled_in import given
from dptrain.config.train_config import TrainConfig
from dptrain.control import RULES, Adapter, Measurement
from dptrain.noise import NoiseScale
from dptrain.runtime.step_reduction import StepRecord
from dptrain.tracking.run_log import RunLog, noise_columns
from dptrain.train.hooks.rate_check import RateCheck
from dptrain.train.progress import Progress

_PATIENCE_SHARE = 10
"""Part of the run without a lower loss after which the loss counts as standing still: one in ten."""


class BatchControl:
    """Decides on batch and rate, acts on it or only logs it, by `control.mode`; the same on every rank.

    Args:
        config: filled in.
        world_size: number of replicas.
    """

    def __init__(self, config: TrainConfig, *, world_size: int) -> None:
        self._config = config
        self._mode = config.control.mode
        self._world_size = world_size
        self._on_record: Mapping[int, int] = {}
        self._record_end = 0
        self._rate_check = RateCheck(patience_samples=given(config.max_samples) // _PATIENCE_SHARE)
        self.adapter = Adapter(
            controller(config, world_size=world_size),
            rule=RULES[given(config.optimizer.rule)],
            reference_batch_size=given(config.optimizer.reference_batch_size),
        )

    def limit_micro_batch(self, config: TrainConfig) -> None:
        """Decide with the micro-batch of `config` from now on."""
        self.adapter.controller = controller(config, world_size=self._world_size)

    def follow(self, decisions: Mapping[int, int], *, up_to: int) -> None:
        """Take the decisions that an earlier attempt put on record, in place of those that would be made now.

        A law that reads step times decides otherwise each time; samples would come in other batches than those that
        were logged already.

        Args:
            decisions: step → global batch size from there on, of those steps at which it changed.
            up_to: the last step whose decision is on record.
        """
        self._on_record, self._record_end = decisions, up_to

    def decide(self, record: StepRecord, progress: Progress, measurement: Measurement, log: RunLog) -> Progress:
        """Return the progress with the batch and the rate from the next step on; log a change of the batch."""
        self._rate_check, warning = self._rate_check.after(
            measurement.noise_scale,
            batch=progress.global_batch_size,
            samples_seen=measurement.samples_seen,
            loss=measurement.loss,
        )
        if warning is not None:
            log.note(warning)
        if self._mode not in ("advise", "adapt"):
            return progress
        applied, is_on_record = self._mode == "adapt", record.step <= self._record_end
        present = progress.global_batch_size if applied else progress.advised or progress.global_batch_size
        adapted = self.adapter.decide(
            measurement,
            allowed=lambda asked: self._on_record.get(record.step, present) if applied and is_on_record else asked,
        )
        batch = adapted.global_batch_size
        if batch != present and not is_on_record:
            log.decision(
                {
                    "step": record.step,
                    "progress/samples": record.end,
                    "batch/before": progress.global_batch_size,
                    "batch/after": batch,
                    "lr_factor/before": progress.learning_rate_factor,
                    "lr_factor/after": adapted.learning_rate_factor,
                    "applied": applied,
                    "reason": adapted.reason,
                    **noise_columns(measurement.noise_scale),
                }
            )
        if not applied:
            return replace(progress, advised=batch)
        if batch == present and adapted.learning_rate_factor == progress.learning_rate_factor:
            return progress
        scaling = beta_scaling(self._config, batch=batch) if batch != present else None
        scaled = None if scaling is None else scaling.scaled(tuned_betas(self._config))
        if scaled is not None and scaled.is_floored:
            log.note(f"batch {batch}: beta1={scaled.beta1:.3g} beta2={scaled.beta2:.3g} (floor of beta_rule)")
        return replace(
            progress,
            global_batch_size=batch,
            learning_rate_factor=adapted.learning_rate_factor,
            num_batch_changes=progress.num_batch_changes + (batch != present),
        )

    def learning_rate_factor(self, scale: NoiseScale, batch: int) -> float:
        """Return the factor on the base rate for a batch."""
        return self.adapter.learning_rate_factor(scale, batch=batch)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return self.adapter.state()

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.adapter.restore(record)
