"""How the settings that a user left open are filled in: from the task, the optimizer, or a saved run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from dptrain.batch import BatchPlan
from dptrain.config.batch_schedule import batch_schedule
from dptrain.config.scaling_rules import DEFAULT_RATE_RULE, PER_SAMPLE
from dptrain.config.tokens import check_in_samples
from dptrain.config.train_config import OptimizerConfig, TrainConfig, optimizer_family
from dptrain.control import CriticalRatio, RuleName
from dptrain.control.settings import ControlConfig
from dptrain.data import choose_micro_batch_size
from dptrain.tasks.base import Suggestion

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = TypeVar("Value")
Group = TypeVar("Group", bound="DataclassInstance")


def filled_in(config: TrainConfig, suggestion: Suggestion, *, world_size: int) -> TrainConfig:
    """Return the settings with every None that has a default replaced by it; what is filled in stays as it is.

    Args:
        config: the settings.
        suggestion: the task's.
        world_size: replicas for which a new run is laid out.

    Raises:
        ConfigError: where the first global batch cannot be laid out over the replicas, or a setting is in tokens.
    """
    check_in_samples(config)
    replicas = config.layout_replicas or world_size
    scheduled = _scheduled_batches(config.control)
    batch = config.global_batch_size or (scheduled or [_suggested_batch(suggestion.global_batch_size, replicas)])[0]
    max_samples = config.max_samples or (config.max_steps or 0) * batch or suggestion.max_samples
    assert config.micro_batch_size != "auto", "found by trying before settings are filled in"
    micro = config.micro_batch_size or _suggested_micro_batch(suggestion.micro_batch_size, batch, replicas)
    # It is the largest one: where the first batch needs less, the replicas only have to share that equally.
    least = micro if batch > micro * replicas else 1
    BatchPlan.exactly(global_batch_size=batch, micro_batch_size=least, world_size=replicas)
    control, optimizer = config.control, config.optimizer
    smallest = min(scheduled, default=min(batch, micro * replicas))
    largest = max(scheduled, default=max(batch, min(64 * batch, max_samples // 50)))
    falls = optimizer.schedule != "constant"
    final = optimizer.final_fraction if optimizer.final_fraction is not None else (0.1 if falls else 0.0)
    warmup = optimizer.warmup_samples if optimizer.warmup_samples is not None else max_samples // 50
    return replace(
        config,
        max_samples=max_samples,
        global_batch_size=batch,
        micro_batch_size=micro,
        layout_replicas=replicas,
        control=replace(
            control,
            critical_ratio=control.critical_ratio or CriticalRatio().median,
            smallest=control.smallest or smallest,
            largest=control.largest or largest,
        ),
        optimizer=replace(
            optimizer,
            learning_rate=optimizer.learning_rate or suggestion.learning_rate,
            reference_batch_size=optimizer.reference_batch_size or batch,
            **_rules(optimizer, control.law),
            warmup_samples=warmup,
            final_fraction=final,
        ),
        log=replace(config.log, eval_every_samples=config.log.eval_every_samples or suggestion.eval_every_samples),
    )


def _rules(optimizer: OptimizerConfig, law: str) -> dict[str, Any]:
    """Return the rules of rate, betas and decay by the preset, and by the law where it acts on the rate itself."""
    if optimizer.preset is not None:
        return dict(PER_SAMPLE[optimizer_family(optimizer.name)])
    of_seesaw: Mapping[str, RuleName] = {"adamw": "square_root", "sgd": "linear"}
    default = of_seesaw if law == "seesaw" else DEFAULT_RATE_RULE
    return {
        "rule": optimizer.rule or default[optimizer_family(optimizer.name)],
        "beta_rule": optimizer.beta_rule or "none",
        "decay_rule": optimizer.decay_rule or "none",
    }


def as_saved(config: TrainConfig, *, saved: Mapping[str, Any]) -> TrainConfig:
    """Return the settings with every None replaced by what a checkpoint says: left open, they are as they were."""
    # A length that is given takes the place of the saved one, whichever of the two says it.
    lengths = {"max_samples": config.max_samples, "max_steps": config.max_steps}
    if any(length is not None for length in lengths.values()):
        saved = {**saved, **lengths}
    return _as_saved(config, saved)


def _as_saved(settings: Group, saved: Mapping[str, Any]) -> Group:
    found: dict[str, Any] = {}
    for name in (setting.name for setting in fields(settings)):
        value = getattr(settings, name)
        if is_dataclass(value) and not isinstance(value, type) and isinstance(saved.get(name), Mapping):
            found[name] = _as_saved(value, saved[name])
        elif value is None and name not in ("run_dir", "branch_from"):
            found[name] = saved.get(name)
    return replace(settings, **found)


def _scheduled_batches(control: ControlConfig) -> list[int]:
    """Return the batches of a schedule in their order; none for another law."""
    stages = () if control.schedule is None else batch_schedule(control.schedule).stages
    return [batch for stage in stages for batch in (stage.batch, stage.ramp_to) if batch is not None]


def _suggested_batch(suggested: int, world_size: int) -> int:
    """Return the smallest batch not below the suggestion that all replicas share equally: a suggestion is soft."""
    return -(-suggested // world_size) * world_size


def _suggested_micro_batch(suggested: int, batch: int, world_size: int) -> int:
    """Return the suggestion, or the next smaller that makes up the first batch: filled-in settings are valid ones."""
    if batch <= suggested * world_size:
        return suggested
    if batch % world_size:
        return 1
    return choose_micro_batch_size(global_batch_size=batch, world_size=world_size, largest=suggested)


def given(value: Value | None) -> Value:
    """Return a setting that `filled_in` has filled in."""
    assert value is not None, "read before filled_in"
    return value


def largest_micro_batch_size(config: TrainConfig) -> int:
    """Return the micro-batch size of filled-in settings."""
    assert isinstance(config.micro_batch_size, int), "read before filled_in"
    return config.micro_batch_size
