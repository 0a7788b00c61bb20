"""The settings of a run, as data, and how what the user left open is filled in; nothing is started here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from dptrain.batch import BatchPlan
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
    RuleName,
    Schedule,
    SeesawLaw,
    StaircaseSchedule,
    adam_betas,
    limited,
)
from dptrain.data import choose_micro_batch_size
from dptrain.errors import ConfigError
from dptrain.noise import Smoothing
from dptrain.noise.derived import CRITICAL_RATIOS, MARGINS
from dptrain.tasks.base import Suggestion
from dptrain.train.domain import Range, check_ranges, check_types

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Value = TypeVar("Value")
Group = TypeVar("Group", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """How the global batch is decided."""

    mode: Literal["off", "measure", "advise", "adapt"] = "adapt"
    """off: nothing is measured; measure: the noise scale is; advise: decisions are made and told, and nothing is
    changed; adapt: they are acted upon."""
    law: Literal[
        "goodput",
        "noise",
        "exchange_rate",
        "norm_test",
        "pollux",
        "seesaw",
        "ramp",
        "kaplan",
        "schedule",
        "constant",
    ] = "goodput"
    """goodput: most progress per second, by the measured time of a step; noise: ratio × noise scale; exchange_rate:
    √(samples_per_step × noise scale); norm_test: noise scale / tolerance²; pollux: goodput with its overlap; seesaw:
    doubles where the schedule halves the rate; ramp: a warm-up to ramp_to; kaplan: from the loss per token; schedule:
    as given; constant. docs/adapt.md says which is for whom."""
    ratio: float = 1.0
    """Batch over noise scale, for law=noise; over the critical batch, for law=kaplan."""
    critical_ratio: float | None = None
    """Critical batch size, at which a run needs twice the samples, over the noise scale, for law=goodput and for plans.
    Default: 3 for adamw, 1 for sgd."""
    margin: float | None = None
    """Factor on the critical batch for law=goodput: a batch too small for its rate lowers the noise scale that is
    measured, and so confirms itself. Below 1 it saves samples. Default: 2/3 for adamw, 1 for sgd."""
    samples_per_step: float | None = None
    """Samples that one optimizer step fewer is worth, for law=exchange_rate."""
    tolerance: float | None = None
    """Standard deviation of the gradient over its size, for law=norm_test."""
    overlap: float = 2.0
    """How well the all-reduce hides behind the backward pass, from 1 (not at all) to 10, for law=pollux."""
    tokens_per_sample: int | None = None
    """Length of a sequence, for law=kaplan."""
    ramp_to: int | None = None
    """Batch at the end of the warm-up, in samples, for law=ramp."""
    ramp_samples: int | None = None
    """Length of the warm-up of the batch, in samples, for law=ramp."""
    ramp_shape: Literal["linear", "doubling"] = "linear"
    """By equal amounts, or by doublings, over equal numbers of samples."""
    schedule: str | None = None
    """Batches by position in samples, for law=schedule: "0:64 100000:128 1M:256"."""
    z: float = 1.0
    """Standard errors at which a noise scale counts as ruled out."""
    smallest: int | None = None
    """Smallest global batch, in samples. Default: a full micro-batch on each replica, or the first batch if smaller;
    of a schedule, its own."""
    largest: int | None = None
    """Largest global batch, in samples. Default: 64 times the first, but at least 50 steps in the run;
    of a schedule, its own."""
    powers_of_two: bool = True
    """Only batches that differ from the first by a power of two."""
    max_change: float = 2.0
    """Largest factor of one change. A batch that is too large by more than its square goes half of the way down."""
    dead_band: float | None = None
    """Ratio of batches below which a change is not worth making. Default, with powers_of_two and a law that measures:
    1.6. Half-way between two rungs, at 1.41, both are as good, and the batch would go to and fro."""
    shrink_band: float | None = None
    """Ratio by which a batch must be too large before it shrinks. Default, with powers_of_two and law=goodput: 2.25,
    for a batch too small confirms itself and one too large does not."""
    dwell_samples: int = 0
    """Samples that must pass from the start, or a change, to the next change."""
    dwell_decisions: int = 10
    """Steps that must be measured from the start, or a change, to the next change by a factor of two; fewer where the
    batch is wrong by more."""
    probe_steps: int | None = None
    """Measured steps for which the double is tried, at least, where the batch has stayed for four times as many; it is
    kept where the law is content with it, too, or finds it too large by less than shrink_band. 0: never. Default: 50
    for law=goodput where it adapts, else 0."""


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How the noise scale is measured."""

    observer: Literal["parameters", "hook"] = "parameters"
    """parameters: each micro-batch; hook: each replica's accumulated gradient, in DDP's communication hook."""
    memory: float = 0.2
    """Half-life of the running means, as a fraction of the run so far, in samples or in steps: the faster counts."""
    half_life_samples: float | None = None
    """A fixed half-life instead, in samples."""
    level: float = 0.95
    """Confidence of the interval."""
    groups: bool = False
    """Measure the parts of the model, its first-level modules, one by one as well."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Which one."""
    learning_rate: float | None = None
    """Base rate, at reference_batch_size (at an infinite batch for rule=noise). Default: the task's."""
    reference_batch_size: int | None = None
    """Global batch, in samples, that learning_rate was tuned at: from there the rule leads to the batch in force.
    Default: the first global batch."""
    rule: Literal["none", "linear", "square_root", "gain", "root_gain", "noise", "surge"] | None = None
    """How the rate follows the batch. Default: root_gain for adamw, gain for sgd; for law=seesaw, which acts on the
    rate itself, square_root and linear."""
    beta_rule: Literal["none", "square_root", "half_life"] = "none"
    """How the betas of adamw follow the batch. square_root: 1 − β in proportion to it; half_life: beta2 forgets over
    equal numbers of samples."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """How the rate falls after the warm-up. wsd: it stays, and falls at the end."""
    decay_fraction: float | None = None
    """Share of the run over which a wsd schedule falls. Default: 0.2."""
    warmup_samples: int | None = None
    """Length of the linear warm-up. Default: 2 % of the run."""
    final_fraction: float | None = None
    """What is left of the rate at the end. Default: 0.1 where the schedule falls."""
    weight_decay: float = 0.1
    """Decoupled for adamw, an L2 term for sgd."""
    beta1: float = 0.9
    """Decay of the first moment, for adamw; momentum, for sgd."""
    beta2: float = 0.95
    """Decay of the second moment, for adamw."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm. null: do not clip."""
    max_skipped_steps: int = 10
    """Steps in a row whose gradient is not finite, and which are therefore skipped, after which the run ends."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of the run is saved."""

    every_samples: int | None = None
    """Samples between two checkpoints. Default: as often as pays, by what a checkpoint costs and how often runs fail.
    One is always written at the end."""
    hours_between_failures: float = 24.0
    """How long the whole run goes on without a failure, on average; decides how often saving pays."""
    keep: int = 3
    """How many are kept."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told while it trains."""

    every_steps: int = 1
    """Steps between two rows of metrics.jsonl."""
    eval_every_samples: int | None = None
    """Samples between two evaluations. Default: the task's. One is always made at the end."""
    print_every_steps: int = 50
    """Steps between two printed lines where there is no terminal."""
    tracker: Literal["auto", "wandb", "none"] = "auto"
    """A second copy of the log. auto: wandb if a key is there."""
    project: str = "dptrain"
    """Project name for the tracker."""
    price_per_device_hour: float | None = None
    """What one GPU (or one replica on CPUs) costs for an hour, in any currency; the run then tells what it cost."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run. What is None is filled in from the task's suggestion before the run starts."""

    task: str = "pysource"
    """A built-in task (pysource, digits, quadratic, linear) or path/to/file.py:function."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task's function."""
    run_dir: str | None = None
    """Folder of the run. Default: runs/TASK-DATE-TIME."""
    branch_from: str | None = None
    """A checkpoint (folder step-…) of another run. This one begins with its parameters, its optimizer and its position
    in the samples, and goes on with settings of its own; max_samples counts from the other's beginning."""
    seed: int = 0
    """Decides initialisation, order of samples and dropout."""
    max_samples: int | None = None
    """Length of the run, in samples. Default: the task's."""
    max_steps: int | None = None
    """Length of the run in optimizer steps instead, for a batch that stays as it is."""
    global_batch_size: int | None = None
    """Samples in the first optimizer steps, all replicas together. Default: the schedule's, or the task's."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Largest number of samples in one forward and backward pass on one replica; a step is always made of at least
    two such passes. auto: the largest that fits into the memory of the GPUs, found by trying. Default: the task's."""
    layout_replicas: int | None = None
    """Replicas among which the micro-batches of a step are shared equally. It stays as it is when a run goes on with
    other replicas: they take the same micro-batches and make the same decisions. Default: those that start the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where there are some; cuda: GPUs, or not at all."""
    precision: Literal["no", "bf16"] = "no"
    """no: as the parameters are; bf16: autocast."""
    num_workers: int = 0
    """Processes that load samples, for each replica."""
    drift_check_every_steps: int = 100
    """Steps between two comparisons of the replicas' parameters, to the last bit; 0: never."""
    control: ControlConfig = field(default_factory=ControlConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_types(TrainConfig, vars(self))
        check_ranges(self, _RANGES)
        _check_law(self)
        _check_bounds(self)
        _check_length(self)
        smoothing(self)


_MOST_WORKERS = 1024  # more is a slip of the finger, and as many processes would be started

_AT_LEAST_1 = Range(text="at least 1", holds=lambda value: value >= 1)
_AT_LEAST_0 = Range(text="at least 0", holds=lambda value: value >= 0)
_POSITIVE = Range(text="positive", holds=lambda value: value > 0)
_RATIO = Range(text="a ratio of batches above 1, such as 1.5", holds=lambda value: value > 1)
_DECAY = Range(text="in [0, 1)", holds=lambda value: 0 <= value < 1)
_NAME = Range(text="a text without control characters", holds=lambda value: value != "" and value.isprintable())
_PATH = Range(
    text="a path without control characters, of at most 4,000 bytes, each part at most 255",
    holds=lambda value: (
        _NAME.holds(value)
        and len(value.encode()) <= 4000  # noqa: PLR2004 - what file systems take
        and all(len(part.encode()) <= 255 for part in value.split("/"))  # noqa: PLR2004 - what file systems take
    ),
)
_RANGES: Mapping[str, Range] = {
    "task": _NAME,
    "run_dir": _PATH,
    "branch_from": _PATH,
    "seed": _AT_LEAST_0,
    "max_samples": _AT_LEAST_1,
    "global_batch_size": _AT_LEAST_1,
    "max_steps": _AT_LEAST_1,
    "micro_batch_size": Range(text="at least 1, or auto", holds=lambda value: value == "auto" or value >= 1),
    "layout_replicas": _AT_LEAST_1,
    "num_workers": Range(text=f"at least 0 and at most {_MOST_WORKERS}", holds=lambda n: 0 <= n <= _MOST_WORKERS),
    "drift_check_every_steps": _AT_LEAST_0,
    "control.ratio": _POSITIVE,
    "control.critical_ratio": _POSITIVE,
    "control.margin": _POSITIVE,
    "control.samples_per_step": _POSITIVE,
    "control.tolerance": _POSITIVE,
    "control.overlap": Range(text="from 1 to 10", holds=lambda value: 1 <= value <= 10),  # noqa: PLR2004 - as it says
    "control.tokens_per_sample": _AT_LEAST_1,
    "control.ramp_to": _AT_LEAST_1,
    "control.ramp_samples": _AT_LEAST_1,
    "control.z": _POSITIVE,
    "control.smallest": _AT_LEAST_1,
    "control.largest": _AT_LEAST_1,
    "control.max_change": Range(text="a factor of at least 2", holds=lambda value: value >= 2),  # noqa: PLR2004 - as it says
    "control.dead_band": _RATIO,
    "control.shrink_band": _RATIO,
    "control.dwell_samples": _AT_LEAST_0,
    "control.dwell_decisions": _AT_LEAST_0,
    "control.probe_steps": _AT_LEAST_0,
    "noise.memory": _POSITIVE,
    "noise.half_life_samples": _POSITIVE,
    "noise.level": Range(text="between 0 and 1, such as 0.95", holds=lambda value: 0 < value < 1),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.reference_batch_size": _AT_LEAST_1,
    "optimizer.warmup_samples": _AT_LEAST_0,
    "optimizer.decay_fraction": Range(text="above 0 and at most 1", holds=lambda value: 0 < value <= 1),
    "optimizer.final_fraction": Range(text="in [0, 1]", holds=lambda value: 0 <= value <= 1),
    "optimizer.weight_decay": _AT_LEAST_0,
    "optimizer.beta1": _DECAY,
    "optimizer.beta2": _DECAY,
    "optimizer.max_grad_norm": _POSITIVE,
    "optimizer.max_skipped_steps": _AT_LEAST_1,
    "checkpoint.every_samples": _AT_LEAST_1,
    "checkpoint.hours_between_failures": _POSITIVE,
    "checkpoint.keep": _AT_LEAST_1,
    "log.every_steps": _AT_LEAST_1,
    "log.eval_every_samples": _AT_LEAST_1,
    "log.print_every_steps": _AT_LEAST_1,
    "log.project": _NAME,
    "log.price_per_device_hour": _POSITIVE,
}
"""What each setting may be beside its type; None, where it is allowed, is always in range."""


def _check_bounds(config: TrainConfig) -> None:
    """Refuse bounds that leave no batch, and a first batch outside them."""
    batch, smallest, largest = config.global_batch_size, config.control.smallest, config.control.largest
    if smallest is not None and largest is not None and smallest > largest:
        raise ConfigError(f"control.smallest {smallest} is above control.largest {largest}")
    if config.control.law == "constant" or batch is None:
        return
    if smallest is not None and batch < smallest:
        raise ConfigError(f"global_batch_size {batch} is below control.smallest {smallest}")
    if largest is not None and batch > largest:
        raise ConfigError(f"global_batch_size {batch} is above control.largest {largest}")


def _check_length(config: TrainConfig) -> None:
    """Refuse a length in steps where the samples of a step are not known beforehand."""
    steps, batch = config.max_steps, config.global_batch_size
    if steps is None:
        return
    if config.control.mode == "adapt" and config.control.law != "constant":
        samples = f"max_samples={steps * batch}" if batch else f"max_samples = {steps} × your batch"
        raise ConfigError(
            f"max_steps={steps} has no fixed length while the batch adapts: write {samples}, or keep the batch with "
            f"control.law=constant"
        )
    if config.max_samples is not None and config.max_samples != steps * (batch or 0):
        raise ConfigError(f"max_steps={steps} and max_samples={config.max_samples} both give a length: leave one out")


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "exchange_rate": ("samples_per_step",),
    "norm_test": ("tolerance",),
    "kaplan": ("tokens_per_sample",),
    "ramp": ("ramp_to", "ramp_samples"),
    "schedule": ("schedule",),
}
"""What each law must be given, and no other law has a use for."""


def _check_law(config: TrainConfig) -> None:
    control, optimizer = config.control, config.optimizer
    for law, names in _NEEDS.items():
        for name in names:
            given = getattr(control, name) is not None
            if control.law == law and not given:
                raise ConfigError(f"control.law={law} needs control.{name}")
            if control.law != law and given:
                raise ConfigError(f"control.{name} is given, but control.law is {control.law}: it would be ignored")
    if control.law == "seesaw" and optimizer.schedule == "constant":
        raise ConfigError("control.law=seesaw needs an optimizer.schedule that falls: it doubles where that halves")
    if control.law == "seesaw" and optimizer.rule not in (None, "square_root", "linear"):
        raise ConfigError(
            f"control.law=seesaw needs optimizer.rule=square_root (adamw) or linear (sgd), which make up for the other "
            f"half of each halving; it is {optimizer.rule}"
        )
    if optimizer.beta_rule != "none" and optimizer.name != "adamw":
        raise ConfigError(
            f"optimizer.beta_rule={optimizer.beta_rule} is about Adam's betas, but the optimizer is {optimizer.name}"
        )
    if optimizer.decay_fraction is not None and optimizer.schedule != "wsd":
        raise ConfigError(
            f"optimizer.decay_fraction is given, but optimizer.schedule is {optimizer.schedule}: it would be ignored"
        )
    if control.law == "schedule":
        Schedule.parse(str(control.schedule))


def filled_in(config: TrainConfig, suggestion: Suggestion, *, world_size: int) -> TrainConfig:
    """Return the settings with every None that has a default replaced by it; what is filled in stays as it is.

    Args:
        config: the settings.
        suggestion: the task's.
        world_size: replicas for which a new run is laid out.

    Raises:
        ConfigError: where the first global batch cannot be laid out over the replicas.
    """
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
    largest = max(scheduled, default=max(batch, config.control.ramp_to or 0, min(64 * batch, max_samples // 50)))
    measures, is_default = control.law not in ("constant", *_BY_HAND), control.law == "goodput"
    dead_band = control.dead_band or (_DEAD_BAND if control.powers_of_two and measures else None)
    shrink_band = control.shrink_band or (_SHRINK_BAND if control.powers_of_two and is_default else None)
    # Advice changes no batch, and so can try none.
    probe_steps = _PROBE_STEPS if is_default and control.mode == "adapt" else 0
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
            critical_ratio=control.critical_ratio or CRITICAL_RATIOS[optimizer.name],
            margin=control.margin or MARGINS[optimizer.name],
            smallest=control.smallest or smallest,
            largest=control.largest or largest,
            dead_band=dead_band,
            shrink_band=shrink_band,
            probe_steps=probe_steps if control.probe_steps is None else control.probe_steps,
        ),
        optimizer=replace(
            optimizer,
            learning_rate=optimizer.learning_rate or suggestion.learning_rate,
            reference_batch_size=optimizer.reference_batch_size or batch,
            rule=optimizer.rule or _DEFAULT_RULES[optimizer.name, control.law == "seesaw"],
            warmup_samples=warmup,
            final_fraction=final,
        ),
        log=replace(config.log, eval_every_samples=config.log.eval_every_samples or suggestion.eval_every_samples),
    )


_DEAD_BAND = 1.6
_SHRINK_BAND = 2.25
_PROBE_STEPS = 50

_DEFAULT_RULES: Mapping[tuple[str, bool], RuleName] = {
    ("adamw", False): "root_gain",
    ("sgd", False): "gain",
    ("adamw", True): "square_root",
    ("sgd", True): "linear",
}
"""By the optimizer, and whether the law is seesaw."""


def as_saved(config: TrainConfig, *, saved: Mapping[str, Any]) -> TrainConfig:
    """Return the settings with every None replaced by what a checkpoint says: left open, they are as they were."""
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
    return [] if control.schedule is None else [batch for _, batch in Schedule.parse(control.schedule).stages]


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


def micro_batch_size(config: TrainConfig, *, global_batch_size: int) -> int:
    """Return the largest micro-batch on the ladder that the settings allow for a batch; the rest is accumulated.

    It depends on the replicas that the run is laid out for, and not on those that there are.
    """
    # At least two micro-batches, on whatever replicas: from a single one no noise can be told.
    largest = max(1, min(largest_micro_batch_size(config), global_batch_size // 2))
    return choose_micro_batch_size(
        global_batch_size=global_batch_size, world_size=given(config.layout_replicas), largest=largest
    )


def largest_micro_batch_size(config: TrainConfig) -> int:
    """Return the micro-batch size of filled-in settings."""
    assert isinstance(config.micro_batch_size, int), "read before filled_in"
    return config.micro_batch_size


def controller(config: TrainConfig, *, world_size: int | None = None) -> Controller:
    """Build the controller of a run from filled-in settings.

    Args:
        config: filled in.
        world_size: replicas that there are; by default those that the run is laid out for.
    """
    control, batch, replicas = config.control, given(config.global_batch_size), given(config.layout_replicas)
    law = _law(config, world_size=world_size or replicas)
    if control.law == "constant":
        return law
    given_by_hand = control.law in _BY_HAND
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
    return limited(law, quantum=_quantum(batch, replicas, powers_of_two=limits.powers_of_two), limits=limits)


def _quantum(batch: int, replicas: int, *, powers_of_two: bool) -> int:
    """Return the lowest rung from which doubling reaches the first batch; without doubling, one sample a replica."""
    if not powers_of_two:
        return replicas
    share = batch // replicas
    return replicas * (share // (share & -share))


_BY_HAND = ("schedule", "ramp", "seesaw")
"""Laws that measure nothing: nothing has to be waited for, and no step is too large."""


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
