"""What filled-in settings describe, built: the controller, the learning-rate schedule, the betas, the smoothing."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from dptrain.config.batch_schedule import batch_schedule
from dptrain.config.filled_in import given, largest_micro_batch_size
from dptrain.config.learning_rate_schedule import FunctionSchedule, LearningRateSchedule, StaircaseSchedule
from dptrain.config.scaling_rules import BetaScaling
from dptrain.config.train_config import TrainConfig
from dptrain.control import BatchSizeGrid, Controller, CriticalRatio, OnGrid
from dptrain.control.batch_scaling import weight_decay_factor
from dptrain.control.contrib.kaplan import KaplanLaw
from dptrain.control.contrib.pollux import PolluxLaw
from dptrain.control.contrib.seesaw import SeesawLaw
from dptrain.control.goodput import GoodputLaw
from dptrain.control.noise_law import NoiseLaw
from dptrain.control.schedule import Constant
from dptrain.data import choose_micro_batch_size
from dptrain.exchange.kinds import no_noise_scale
from dptrain.noise import Smoothing
from dptrain.observe.measurement_interval import MeasurementInterval, NeverMeasured
from dptrain.ranges import SCHEDULES
from dptrain.tasks.resolve import load_object


def micro_batch_size(config: TrainConfig, *, global_batch_size: int) -> int:
    """Return the largest micro-batch size that the settings allow for a batch; the rest is accumulated.

    It depends on the replicas that the run is laid out for, and not on those that there are.
    """
    # At least two micro-batches over all replicas: one alone does not show any noise.
    largest = max(1, min(largest_micro_batch_size(config), global_batch_size // 2))
    return choose_micro_batch_size(
        global_batch_size=global_batch_size, world_size=given(config.layout_replicas), largest=largest
    )


def controller(config: TrainConfig, *, world_size: int | None = None, quantum: int | None = None) -> Controller:
    """Build the controller of a run from filled-in settings.

    Args:
        config: filled in.
        world_size: replicas that there are; by default those that the run is laid out for.
        quantum: samples that the batch is a multiple of, where the micro-batch of a loop stays what it is.
    """
    control, batch, replicas = config.control, given(config.global_batch_size), given(config.layout_replicas)
    law = _law(config, world_size=world_size or replicas)
    if control.law == "constant":
        return law
    powers_of_two = control.law != "schedule"
    grid = BatchSizeGrid(
        quantum=quantum or (_quantum(batch, replicas) if powers_of_two else replicas),
        smallest=given(control.smallest),
        largest=given(control.largest),
        powers_of_two=powers_of_two,
    )
    return OnGrid(law, grid)


def _quantum(batch: int, replicas: int) -> int:
    """Return the smallest batch that all replicas share equally and from which doubling reaches the first batch."""
    share = batch // replicas
    return replicas * (share // (share & -share))


def _law(config: TrainConfig, *, world_size: int) -> Controller:
    control, batch = config.control, given(config.global_batch_size)
    if control.law == "constant":
        return Constant(global_batch_size=batch)
    if control.law == "schedule":
        return batch_schedule(given(control.schedule))
    if control.law == "seesaw":
        return SeesawLaw(halvings=StaircaseSchedule(schedule=_schedule(config)).halvings, first=batch)
    if control.law == "kaplan":
        return KaplanLaw(**control.law_options)
    if control.law == "noise":
        return NoiseLaw(
            **control.law_options,
            min_gain=control.min_gain,
            no_decrease_samples=given(config.optimizer.warmup_samples),
        )
    kind = partial(PolluxLaw, **control.law_options) if control.law == "pollux" else GoodputLaw
    return kind(
        largest_micro_batch_size=largest_micro_batch_size(config),
        # As `micro_batch_size` lays them out: two micro-batches at least, and those of replicas that are not there.
        least_accumulation_steps=-(-max(given(config.layout_replicas), 2) // world_size),
        critical_ratio=CriticalRatio(median=given(control.critical_ratio)),
        min_gain=control.min_gain,
        no_decrease_samples=given(config.optimizer.warmup_samples),
    )


def learning_rate_schedule(config: TrainConfig) -> LearningRateSchedule | StaircaseSchedule | FunctionSchedule:
    """Build the course of the base rate from filled-in settings."""
    if config.optimizer.schedule not in SCHEDULES:
        name = config.optimizer.schedule
        return FunctionSchedule(function=load_object(name), max_samples=given(config.max_samples), name=name)
    schedule = _schedule(config)
    return StaircaseSchedule(schedule=schedule) if config.control.law == "seesaw" else schedule


def _schedule(config: TrainConfig) -> LearningRateSchedule:
    optimizer = config.optimizer
    return LearningRateSchedule(
        kind=cast("Any", optimizer.schedule),  # one of its kinds, by the range of the setting
        warmup_samples=given(optimizer.warmup_samples),
        max_samples=config.max_samples if optimizer.schedule != "constant" else None,
        final_fraction=given(optimizer.final_fraction),
        decay_fraction=optimizer.decay_fraction,
    )


def beta_scaling(config: TrainConfig, *, batch: int) -> BetaScaling | None:
    """Return how Adam's betas follow a batch; None where they stay as they are."""
    optimizer = config.optimizer
    if optimizer.beta_rule in (None, "none"):
        return None
    return BetaScaling(rule=optimizer.beta_rule, batch=batch, reference_batch=given(optimizer.reference_batch_size))


def tuned_betas(config: TrainConfig) -> tuple[float, float]:
    """Return the betas at the reference batch of all parameter groups that have none of their own."""
    optimizer = config.optimizer
    beta1, beta2 = optimizer.options.get("betas", (optimizer.beta1, optimizer.beta2))
    return beta1, beta2


def decay_factor(config: TrainConfig, *, batch: int, rate_factor: float) -> float | None:
    """Return the factor on each parameter group's weight decay for a batch; None where they stay as they are."""
    optimizer = config.optimizer
    if optimizer.decay_rule in (None, "none"):
        return None
    reference = given(optimizer.reference_batch_size)
    return weight_decay_factor(optimizer.decay_rule, batch=batch, reference_batch=reference, rate_factor=rate_factor)


def measurement_interval(config: TrainConfig) -> MeasurementInterval:
    """Build the rule that says which steps are measured."""
    control, noise = config.control, config.noise
    if control.mode == "off" or no_noise_scale(config.exchange) is not None:
        return NeverMeasured()
    # An interval that is chosen by the clock makes two runs of a seed differ where the batch or the rate rests on the
    # noise scale. Under laws that read step times they differ anyway, and decisions are followed from the record.
    reads_clock = control.law in ("goodput", "pollux")
    acts_on_noise = control.law in ("noise", "kaplan") or _rate_follows_noise(config)
    by_seed = control.mode == "adapt" and acts_on_noise and not reads_clock
    every = 1 if noise.every is None and by_seed else noise.every
    return MeasurementInterval(every=every, budget=noise.budget)


def _rate_follows_noise(config: TrainConfig) -> bool:
    """Whether the learning rate of some step depends on the noise scale."""
    rule = config.optimizer.rule
    is_tuned_batch = given(config.global_batch_size) == given(config.optimizer.reference_batch_size)
    at_one_batch = config.control.law == "constant" and is_tuned_batch  # where all rules but `noise` give 1
    return rule == "noise" or (rule in ("gain", "root_gain", "surge") and not at_one_batch)


def smoothing(config: TrainConfig) -> Smoothing:
    """Build the smoothing of the noise scale."""
    return Smoothing(memory=config.noise.memory, half_life_samples=config.noise.half_life_samples)
