"""The settings of a run, as data; the settings of control, noise and checkpoint live beside their owners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dptrain.checkpoint.settings import CheckpointConfig
from dptrain.config.validation import check_ranges, check_types
from dptrain.control import Schedule
from dptrain.control.settings import ControlConfig
from dptrain.errors import ConfigError
from dptrain.noise import Smoothing
from dptrain.observe.settings import NoiseConfig
from dptrain.ranges import (
    AT_LEAST_0,
    AT_LEAST_1,
    AT_LEAST_1_OR_AUTO,
    DECAY,
    NAME,
    PATH,
    POSITIVE,
    SHARE,
    between,
    setting,
)

_MOST_WORKERS = 1024  # more is a typing error, and as many processes would be started


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Which one."""
    learning_rate: float | None = setting(None, POSITIVE)
    """Base rate, at reference_batch_size (at an infinite batch for rule=noise). Default: the task's."""
    reference_batch_size: int | None = setting(None, AT_LEAST_1)
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
    decay_fraction: float | None = setting(None, SHARE)
    """Share of the run over which a wsd schedule falls. Default: 0.2."""
    warmup_samples: int | None = setting(None, AT_LEAST_0)
    """Length of the linear warm-up. Default: 2 % of the run."""
    final_fraction: float | None = setting(None, between(0, 1))
    """What is left of the rate at the end. Default: 0.1 where the schedule falls."""
    weight_decay: float = setting(0.1, AT_LEAST_0)
    """Decoupled for adamw, an L2 term for sgd."""
    beta1: float = setting(0.9, DECAY)
    """Decay of the first moment, for adamw; momentum, for sgd."""
    beta2: float = setting(0.95, DECAY)
    """Decay of the second moment, for adamw."""
    max_grad_norm: float | None = setting(1.0, POSITIVE)
    """Clip the gradient to this norm. null: do not clip."""
    max_skipped_steps: int = setting(10, AT_LEAST_1)
    """Steps in a row whose gradient is not finite, and which are therefore skipped, after which the run ends."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told while it trains."""

    every_steps: int = setting(1, AT_LEAST_1)
    """Steps between two rows of metrics.jsonl."""
    eval_every_samples: int | None = setting(None, AT_LEAST_1)
    """Samples between two evaluations. Default: the task's. One is always made at the end."""
    print_every_steps: int = setting(50, AT_LEAST_1)
    """Steps between two printed lines where there is no terminal."""
    tracker: Literal["auto", "wandb", "none"] = "auto"
    """A second copy of the log. auto: wandb if a key is there."""
    project: str = setting("dptrain", NAME)
    """Project name for the tracker."""
    price_per_device_hour: float | None = setting(None, POSITIVE)
    """What one GPU (or one replica on CPUs) costs for an hour, in any currency; the run then tells what it cost."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run. What is None is filled in from the task's suggestion before the run starts."""

    task: str = setting("pysource", NAME)
    """A built-in task (pysource, digits, quadratic, linear) or path/to/file.py:function."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task's function."""
    run_dir: str | None = setting(None, PATH)
    """Folder of the run. Default: runs/TASK-DATE-TIME."""
    branch_from: str | None = setting(None, PATH)
    """A checkpoint (folder step-…) of another run. This one begins with its parameters, its optimizer and its position
    in the samples, and goes on with settings of its own; max_samples counts from the other's beginning."""
    seed: int = setting(0, AT_LEAST_0)
    """Decides initialisation, order of samples and dropout."""
    max_samples: int | None = setting(None, AT_LEAST_1)
    """Length of the run, in samples. Default: the task's."""
    max_steps: int | None = setting(None, AT_LEAST_1)
    """Length of the run in optimizer steps instead, for a batch that stays as it is."""
    global_batch_size: int | None = setting(None, AT_LEAST_1)
    """Samples in the first optimizer steps, all replicas together. Default: the schedule's, or the task's."""
    micro_batch_size: int | Literal["auto"] | None = setting(None, AT_LEAST_1_OR_AUTO)
    """Largest number of samples in one forward and backward pass on one replica; a step is always made of at least
    two such passes. auto: the largest that fits into the memory of the GPUs, found by trying. Default: the task's."""
    layout_replicas: int | None = setting(None, AT_LEAST_1)
    """Replicas among which the micro-batches of a step are shared equally. It stays as it is when a run goes on with
    other replicas: they take the same micro-batches and make the same decisions. Default: those that start the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: GPUs where there are some; cuda: GPUs, or not at all."""
    precision: Literal["no", "bf16"] = "no"
    """no: as the parameters are; bf16: autocast."""
    num_workers: int = setting(0, between(0, _MOST_WORKERS))
    """Processes that load samples, for each replica."""
    replica_check_every_steps: int = setting(100, AT_LEAST_0)
    """Steps between two comparisons of the replicas' parameters, to the last bit; 0: never."""
    control: ControlConfig = field(default_factory=ControlConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_types(TrainConfig, vars(self))
        check_ranges(self)
        _check_law(self)
        _check_bounds(self)
        _check_length(self)
        Smoothing(memory=self.noise.memory, half_life_samples=self.noise.half_life_samples)


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
