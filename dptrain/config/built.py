"""What filled-in settings describe, built: the controller, the learning-rate schedule, the betas, the smoothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from dptrain.config.filled_in import BY_HAND, given, largest_micro_batch_size
from dptrain.config.train_config import TrainConfig
from dptrain.control import (
    Constant,
    Controller,
    ExchangeRateLaw,
    GoodputLaw,
    KaplanLaw,
    LearningRateSchedule,
    Limits,
    NoiseLaw,
    NormTestLaw,
    PolluxLaw,
    Ramp,
    Schedule,
    SeesawLaw,
    StaircaseSchedule,
    adam_betas,
    limited,
)
from dptrain.data import choose_micro_batch_size
from dptrain.noise import Smoothing


def micro_batch_size(config: TrainConfig, *, global_batch_size: int) -> int:
    """Return the largest micro-batch on the ladder that the settings allow for a batch; the rest is accumulated.

    It depends on the replicas that the run is laid out for, and not on those that there are.
    """
    # At least two micro-batches, on whatever replicas: from a single one no noise can be told.
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
    given_by_hand = control.law in BY_HAND
    limits = Limits(
        smallest=control.smallest,
        largest=given(control.largest),
        powers_of_two=control.powers_of_two and control.law != "schedule",
        max_change=None if given_by_hand else control.max_change,
        dead_band=control.dead_band,
        shrink_band=control.shrink_band,
        grow_only_samples=0 if given_by_hand else given(config.optimizer.warmup_samples),
        dwell_samples=control.dwell_samples,
        dwell_decisions=0 if given_by_hand else control.dwell_decisions,
        probe_steps=given(control.probe_steps) if control.mode == "adapt" and not given_by_hand else 0,
    )
    quantum = quantum or _quantum(batch, replicas, powers_of_two=limits.powers_of_two)
    return limited(law, quantum=quantum, limits=limits)


def _quantum(batch: int, replicas: int, *, powers_of_two: bool) -> int:
    """Return the lowest rung from which doubling reaches the first batch; without doubling, one sample a replica."""
    if not powers_of_two:
        return replicas
    share = batch // replicas
    return replicas * (share // (share & -share))


def _law(config: TrainConfig, *, world_size: int) -> Controller:
    control, batch = config.control, given(config.global_batch_size)
    if control.law in ("goodput", "pollux"):
        goodput = partial(GoodputLaw, critical_ratio=given(control.margin) * given(control.critical_ratio))
        kind = goodput if control.law == "goodput" else partial(PolluxLaw, overlap=control.overlap)
        return kind(
            largest_micro_batch_size=largest_micro_batch_size(config),
            # As `micro_batch_size` lays them out: two micro-batches at least, and those of replicas that are not there.
            least_accumulation_steps=-(-max(given(config.layout_replicas), 2) // world_size),
            grow_only_samples=given(config.optimizer.warmup_samples),
            z=control.z,
        )
    laws: Mapping[str, Callable[[], Controller]] = {
        "noise": lambda: NoiseLaw(ratio=control.ratio, z=control.z),
        "exchange_rate": lambda: ExchangeRateLaw(samples_per_step=given(control.samples_per_step), z=control.z),
        "norm_test": lambda: NormTestLaw(tolerance=given(control.tolerance), z=control.z),
        "seesaw": lambda: SeesawLaw(staircase=StaircaseSchedule(schedule=_schedule(config)), first=batch),
        "ramp": lambda: Ramp(
            first=batch,
            last=given(control.ramp_to),
            num_samples=given(control.ramp_samples),
            shape=control.ramp_shape,
        ),
        "kaplan": lambda: KaplanLaw(tokens_per_sample=given(control.tokens_per_sample), ratio=control.ratio),
        "schedule": lambda: Schedule.parse(given(control.schedule)),
        "constant": lambda: Constant(global_batch_size=batch),
    }
    return laws[control.law]()


def learning_rate_schedule(config: TrainConfig) -> LearningRateSchedule | StaircaseSchedule:
    """Build the course of the base rate from filled-in settings."""
    schedule = _schedule(config)
    return StaircaseSchedule(schedule=schedule) if config.control.law == "seesaw" else schedule


def _schedule(config: TrainConfig) -> LearningRateSchedule:
    optimizer = config.optimizer
    return LearningRateSchedule(
        kind=optimizer.schedule,
        warmup_samples=given(optimizer.warmup_samples),
        max_samples=config.max_samples if optimizer.schedule != "constant" else None,
        final_fraction=given(optimizer.final_fraction),
        decay_fraction=optimizer.decay_fraction,
    )


def betas(config: TrainConfig, *, batch: int) -> tuple[float, float] | None:
    """Return Adam's betas for a batch; None where they stay as they are."""
    optimizer = config.optimizer
    if optimizer.beta_rule == "none":
        return None
    tuned = (optimizer.beta1, optimizer.beta2)
    return adam_betas(optimizer.beta_rule, tuned, batch=batch, reference_batch=given(optimizer.reference_batch_size))


def smoothing(config: TrainConfig) -> Smoothing:
    """Build the smoothing of the noise scale."""
    return Smoothing(memory=config.noise.memory, half_life_samples=config.noise.half_life_samples)
