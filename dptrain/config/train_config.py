"""The settings of a run, as data; the settings of control, noise and checkpoint live beside their owners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dptrain.checkpoint.settings import CheckpointConfig
from dptrain.config.batch_schedule import batch_schedule
from dptrain.config.exchange_check import check_exchange
from dptrain.config.execution import ExecutionConfig
from dptrain.config.scaling_rules import DEFAULT_RATE_RULE, PER_SAMPLE, check_scaling
from dptrain.config.tokens import check_units
from dptrain.config.validation import check_ranges, check_types
from dptrain.control.settings import ControlConfig
from dptrain.error_text import shown
from dptrain.errors import ConfigError
from dptrain.exchange.settings import ExchangeConfig
from dptrain.models.settings import DistillationConfig, ModelConfig, SparsityConfig
from dptrain.noise import Smoothing
from dptrain.noise.settings import NoiseConfig
from dptrain.ranges import (
    AT_LEAST_0,
    AT_LEAST_1,
    AT_LEAST_1_OR_AUTO,
    DECAY,
    NAME,
    PATH,
    PORT,
    POSITIVE,
    SCHEDULE,
    SHARE,
    TRACKERS,
    between,
    setting,
)

_MOST_WORKERS = 1024  # more is a typing error, and as many processes would be started


def optimizer_family(name: str) -> str:
    """Return the optimizer whose defaults another one takes: all but plain SGD divide the gradient by its size."""
    return "sgd" if name.lower() in ("sgd", "asgd") else "adamw"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    name: str = setting("adamw", NAME)
    """A class of torch.optim (adamw, sgd, muon, adafactor, nadam, …), package.module:Class, or file.py:function, a
    function of the model that returns parameter groups or an optimizer."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that class, beside those that have settings here."""
    learning_rate: float | None = setting(None, POSITIVE)
    """Learning rate at reference_batch_size. For rule=noise: at an infinite batch. Default: the task's."""
    reference_batch_size: int | None = setting(None, AT_LEAST_1)
    """Global batch, in samples, that learning_rate was tuned at; the rule scales the rate from there to the batch in
    use. Default: the first global batch."""
    reference_batch_tokens: int | None = setting(None, AT_LEAST_1)
    """reference_batch_size in tokens, for a task whose samples are made of tokens."""
    preset: Literal["per_sample"] | None = None
    """per_sample: rate, betas and weight decay follow the batch together, so that training per sample stays the same:
    rule=root_gain, beta_rule=half_life, decay_rule=timescale for adamw; rule=gain, decay_rule=timescale for sgd."""
    rule: Literal["none", "linear", "square_root", "gain", "root_gain", "noise", "surge"] | None = None
    """Scaling of the learning rate with the batch. Default: root_gain for adamw, gain for sgd; with law=seesaw:
    square_root for adamw, linear for sgd."""
    beta_rule: Literal["none", "square_root", "half_life"] | None = None
    """Scaling of adamw's betas with the batch. square_root: 1 − β in proportion to it; half_life: both keep their
    half-life in samples. Floors: beta1 0.8, beta2 max(0.9, beta1²). Default: none."""
    decay_rule: Literal["none", "timescale"] | None = None
    """Scaling of the weight decay with the batch. timescale: batch / (rate × decay) is kept. Default: none."""
    schedule: str = setting("cosine", SCHEDULE)
    """Decay of the learning rate after warm-up: constant, cosine, linear, or wsd (constant, then a linear decay at the
    end). Or file.py:function: the factor on the rate, warm-up included, from samples seen and samples of the run."""
    decay_fraction: float | None = setting(None, SHARE)
    """Fraction of the run over which a wsd schedule decays. Default: 0.2."""
    warmup_samples: int | None = setting(None, AT_LEAST_0)
    """Length of the linear warm-up, in samples. Default: 2 % of the run."""
    warmup_tokens: int | None = setting(None, AT_LEAST_0)
    """Length of the linear warm-up in tokens, in place of warmup_samples."""
    final_fraction: float | None = setting(None, between(0, 1))
    """Final learning rate as a fraction of the peak. Default: 0.1 for a schedule that decays."""
    weight_decay: float = setting(0.1, AT_LEAST_0)
    """Of matrices; decoupled where the class can do that, else an L2 term, as for sgd."""
    beta1: float = setting(0.9, DECAY)
    """Decay of the first moment, for classes with betas; momentum, for sgd."""
    beta2: float = setting(0.95, DECAY)
    """Decay of the second moment, for classes with betas."""
    average_decay: float | None = setting(None, DECAY)
    """Decay of an exponential average of the weights in a step of reference_batch_size samples; a larger step decays
    more. It is evaluated beside the weights and saved in checkpoints. Default: no average."""
    max_grad_norm: float | None = setting(1.0, POSITIVE)
    """Largest gradient norm; larger gradients are clipped. null: no clipping."""
    max_skipped_steps: int = setting(10, AT_LEAST_1)
    """Number of consecutive skipped steps (gradient not finite) that ends the run."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """When a run ends before its length is reached."""

    patience: int | None = setting(None, AT_LEAST_1)
    """Evaluations in a row without improvement after which the run ends. Default: it never does."""
    figure: str = setting("loss", NAME)
    """Name of the held-out figure."""
    higher_is_better: bool = False
    """Whether it grows as the model improves, as an accuracy does."""
    min_improvement: float = setting(0.0, AT_LEAST_0)
    """Smaller improvements count as none."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run records and prints."""

    every_steps: int = setting(1, AT_LEAST_1)
    """Steps between two rows of metrics.jsonl."""
    eval_every_samples: int | None = setting(None, AT_LEAST_1)
    """Samples between two evaluations; there is always one at the end. Default: the task's."""
    eval_every_tokens: int | None = setting(None, AT_LEAST_1)
    """Tokens between two evaluations, in place of eval_every_samples."""
    print_every_steps: int = setting(50, AT_LEAST_1)
    """Steps between two printed lines; the live view on a terminal does not use it."""
    console: Literal["auto", "json"] = "auto"
    """What is printed. auto: a live view on a terminal, lines elsewhere; json: one JSON object per line."""
    metrics_file: str | None = setting(None, PATH)
    """Text file for Prometheus' node exporter (its textfile collector), rewritten every second."""
    metrics_port: int | None = setting(None, PORT)
    """Port on loopback where Prometheus may read the metrics (http://127.0.0.1:PORT/metrics)."""
    opentelemetry: bool = False
    """Metrics through the OpenTelemetry SDK, where its OTEL_ variables say."""
    tracker: str = setting("auto", TRACKERS)
    """Experiment trackers: wandb, tensorboard, trackio, mlflow, or several as tensorboard+wandb. auto: wandb if you are
    logged in to it; none."""
    project: str = setting("dptrain", NAME)
    """Project name for the tracker."""
    price_per_device_hour: float | None = setting(None, POSITIVE)
    """Price of one GPU-hour (on CPUs: of one replica-hour), in any currency; adds the cost to log and summary."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a run. None means: filled in from the task's suggestion before the run starts."""

    task: str = setting("pysource", NAME)
    """Built-in task (see `dptrain tasks`) or path/to/file.py:function."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task's function."""
    run_dir: str | None = setting(None, PATH)
    """Folder of the run. Default: runs/TASK-DATE-TIME."""
    branch_from: str | None = setting(None, PATH)
    """Checkpoint (folder step-…) of another run to start from: its parameters, optimizer state and position in the
    samples, with the settings of this run. max_samples counts from the start of the other run."""
    seed: int = setting(0, AT_LEAST_0)
    """Seed of initialisation, sample order and dropout."""
    max_samples: int | None = setting(None, AT_LEAST_1)
    """Length of the run, in samples. Default: the task's."""
    max_tokens: int | None = setting(None, AT_LEAST_1)
    """Length of the run in tokens, in place of max_samples, for a task whose samples are made of tokens (gpt, pysource,
    huggingface). All settings in tokens are rounded to whole samples."""
    max_steps: int | None = setting(None, AT_LEAST_1)
    """Length of the run in optimizer steps, for a constant batch (control.law=constant)."""
    global_batch_size: int | None = setting(None, AT_LEAST_1)
    """First global batch, in samples over all replicas. Default: the schedule's, or the task's."""
    global_batch_tokens: int | None = setting(None, AT_LEAST_1)
    """First global batch in tokens, in place of global_batch_size."""
    micro_batch_size: int | Literal["auto"] | None = setting(None, AT_LEAST_1_OR_AUTO)
    """Most samples in one forward-backward on one replica; a step has at least two of them. auto: the largest that fits
    into GPU memory, found by trial. Default: the task's."""
    layout_replicas: int | None = setting(None, AT_LEAST_1)
    """Number of replicas that a step's micro-batches are laid out for. A run resumed on another number keeps it, so
    micro-batches and decisions stay the same. Default: the number that starts the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: GPUs if there are any; cuda: an error without a GPU."""
    precision: Literal["no", "bf16", "bf16_parameters", "fp16", "fp8"] = "no"
    """Precision of forward and backward. no: that of the parameters; bf16: autocast; bf16_parameters: parameters and
    gradients in bfloat16, with float32 copies for the optimizer; fp16: autocast with a dynamic loss scale; fp8: bf16
    with products of linear layers in float8, by torchao (H100 or newer)."""
    find_unused_parameters: bool | None = None
    """Whether DDP looks, in each step, for parameters that the loss did not use, which costs some time. Default: where
    the first samples leave some unused."""
    num_workers: int = setting(0, between(0, _MOST_WORKERS))
    """Data-loading processes per replica."""
    replica_check_every_steps: int = setting(100, AT_LEAST_0)
    """Steps between two bit-exact comparisons of the replicas' parameters; 0: never."""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_types(TrainConfig, vars(self))
        check_ranges(self)
        check_units(self)
        _check_law(self)
        _check_bounds(self)
        _check_length(self)
        _check_sparsity(self)
        _check_quantization(self)
        _check_hidden_states(self)
        check_exchange(
            self.exchange,
            control=self.control,
            rule=self.optimizer.rule,
            average_decay=self.optimizer.average_decay,
            wrapper=self.execution.wrapper,
            precision=self.precision,
            sparsity=self.sparsity.method,
        )
        _check_wrapper(self)
        _check_float8(self)
        _check_expert_parallel(self)
        Smoothing(memory=self.noise.memory, half_life_samples=self.noise.half_life_samples)


def _check_wrapper(config: TrainConfig) -> None:
    """Refuse what needs the whole model on each replica where it is cut up."""
    if config.optimizer.average_decay is not None and config.execution.wrapper != "ddp":
        raise ConfigError(
            f"optimizer.average_decay={config.optimizer.average_decay} averages whole weights, and execution.wrapper="
            f"{config.execution.wrapper} cuts them up: use execution.wrapper=ddp, or leave the average out"
        )


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


def _check_sparsity(config: TrainConfig) -> None:
    """Refuse what masks cannot go with: parts of a weight elsewhere, copies of it, or averages over masks."""
    if config.sparsity.method == "off":
        return
    reasons = {
        f"execution.wrapper={config.execution.wrapper} cuts weights up: use ddp": config.execution.wrapper != "ddp",
        "precision=bf16_parameters keeps copies of the weights: use bf16": config.precision == "bf16_parameters",
        "model.lora_rank freezes the layers that would be sparse": config.model.lora_rank is not None,
        "optimizer.average_decay would average weights of different masks: use method=static": (
            config.sparsity.method == "rigl" and config.optimizer.average_decay is not None
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"sparsity.method={config.sparsity.method} does not go with it: {reason}")


def _check_float8(config: TrainConfig) -> None:
    """Refuse what float8 layers were never tried with."""
    if config.precision != "fp8":
        return
    reasons = {
        f"execution.wrapper={config.execution.wrapper} gathers weights in a precision of its own: use ddp": (
            config.execution.wrapper != "ddp"
        ),
        "model.lora_rank puts the linear layers into layers of its own: leave it out": (
            config.model.lora_rank is not None
        ),
        f"sparsity.method={config.sparsity.method} has masks for the linear layers: leave it out": (
            config.sparsity.method != "off"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"precision=fp8 does not go with it: {reason}; or use precision=bf16")


def _check_quantization(config: TrainConfig) -> None:
    """Refuse what would round a second time or is not emulated, and settings that would be ignored."""
    model, execution = config.model, config.execution
    if model.quantize is None:
        for name, is_given in (
            ("rounding", model.rounding != "nearest"),
            ("unquantized", model.unquantized is not None),
        ):
            if is_given:
                raise ConfigError(f"model.{name} is given without model.quantize: it would be ignored")
        return
    reasons = {
        f"precision={config.precision} rounds the products again: leave it out": config.precision != "no",
        "execution.tf32 rounds the products again: leave it out": execution.tf32,
        f"execution.compile={execution.compile} is not emulated: leave it out": execution.compile != "off",
        f"execution.wrapper={execution.wrapper} cuts up the weights that share a scale: use ddp": (
            execution.wrapper != "ddp"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"model.quantize={model.quantize} does not go with it: {reason}")


def _check_expert_parallel(config: TrainConfig) -> None:
    """Refuse what does not know of experts that are on other replicas, or was never tried with them."""
    size, execution = config.execution.expert_parallel_size, config.execution
    if size == 1:
        return
    reasons = {
        f"execution.wrapper={execution.wrapper} would cut the experts up once more: use ddp": (
            execution.wrapper != "ddp"
        ),
        f"execution.compile={execution.compile} would have to compile the all-to-all: leave it out": (
            execution.compile != "off"
        ),
        f"exchange.kind={config.exchange.kind} needs whole gradients on each replica: use all_reduce": (
            config.exchange.kind != "all_reduce"
        ),
        "noise.observer=hook sees what DDP reduces, and not the experts: use parameters": (
            config.noise.observer == "hook" and config.control.mode != "off"
        ),
        "precision=bf16_parameters keeps copies of whole weights: use bf16": config.precision == "bf16_parameters",
        "optimizer.average_decay averages whole weights: leave it out": config.optimizer.average_decay is not None,
        f"sparsity.method={config.sparsity.method} has masks for whole weights: leave it out": (
            config.sparsity.method != "off"
        ),
        f"model.quantize={config.model.quantize} is not emulated in experts: leave it out": (
            config.model.quantize is not None
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"execution.expert_parallel_size={size} does not go with it: {reason}")


def _check_hidden_states(config: TrainConfig) -> None:
    """Refuse hidden states of no teacher, or of modules that are compiled away."""
    if config.distillation.hidden is None:
        return
    if config.distillation.teacher is None:
        raise ConfigError("distillation.hidden is given without distillation.teacher: it would be ignored")
    if config.execution.compile != "off":
        raise ConfigError(
            f"distillation.hidden looks at modules while they run, and execution.compile={config.execution.compile} "
            f"melts them together: leave one of them out"
        )


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


_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "schedule": ("schedule",),
    "schedule_tokens": ("schedule",),
}
"""The laws that have a use for a setting; others refuse it."""
_LAW_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "noise": ("ratio", "samples_per_step"),
    "pollux": ("overlap",),
    "kaplan": ("tokens_per_sample", "ratio"),
}
"""What `control.law_options` may hold, by the law."""


def _check_law(config: TrainConfig) -> None:
    control, optimizer = config.control, config.optimizer
    for name, laws in _ONLY_FOR.items():
        if getattr(control, name) is not None and control.law not in laws:
            raise ConfigError(f"control.{name} is given, but control.law is {control.law}: it would be ignored")
    if control.law == "schedule" and control.schedule is None and control.schedule_tokens is None:
        raise ConfigError("control.law=schedule needs control.schedule")
    _check_law_options(control)
    if control.law == "seesaw" and optimizer.schedule == "constant":
        raise ConfigError("control.law=seesaw needs an optimizer.schedule that falls: it doubles where that halves")
    if control.law == "seesaw" and optimizer.rule not in (None, "square_root", "linear"):
        raise ConfigError(
            f"control.law=seesaw needs optimizer.rule=square_root (adamw) or linear (sgd), which make up for the other "
            f"half of each halving; it is {optimizer.rule}"
        )
    _check_scaling(optimizer)
    if optimizer.decay_fraction is not None and optimizer.schedule != "wsd":
        raise ConfigError(
            f"optimizer.decay_fraction is given, but optimizer.schedule is {optimizer.schedule}: it would be ignored"
        )
    if control.schedule is not None:
        batch_schedule(control.schedule)
    if control.schedule_tokens is not None:
        batch_schedule(control.schedule_tokens, unit="tokens")


def _check_law_options(control: ControlConfig) -> None:
    known = _LAW_OPTIONS.get(control.law, ())
    if unknown := sorted(set(control.law_options) - set(known)):
        taken = ", ".join(known) or "none"
        raise ConfigError(f"control.law_options of {control.law} has no option {', '.join(unknown)}; it takes {taken}")
    for name, value in control.law_options.items():
        if type(value) not in (int, float) or value <= 0:
            raise ConfigError(f"control.law_options.{name} must be a positive number, got {shown(value)}")
    if control.law == "noise" and len(control.law_options) > 1:
        raise ConfigError("ratio and samples_per_step of control.law_options exclude each other: leave one out")
    if control.law == "kaplan" and "tokens_per_sample" not in control.law_options:
        raise ConfigError("control.law=kaplan needs control.law_options.tokens_per_sample")


def _check_scaling(optimizer: OptimizerConfig) -> None:
    """Refuse rules of rate, betas and decay that do not go together."""
    rules = {name: getattr(optimizer, name) for name in ("rule", "beta_rule", "decay_rule")}
    if optimizer.preset is not None and (given := [name for name, rule in rules.items() if rule is not None]):
        meant = PER_SAMPLE[optimizer_family(optimizer.name)]
        if {name: rules[name] for name in given}.items() - meant.items():
            raise ConfigError(
                f"optimizer.preset={optimizer.preset} sets {', '.join(f'{k}={v}' for k, v in meant.items())}: leave "
                f"{' and '.join(f'optimizer.{name}' for name in given)} out, or the preset"
            )
    if optimizer.beta_rule not in (None, "none") and optimizer_family(optimizer.name) != "adamw":
        raise ConfigError(
            f"optimizer.beta_rule={optimizer.beta_rule} is about Adam's betas, but the optimizer is {optimizer.name}"
        )
    check_scaling(
        rate=optimizer.rule or DEFAULT_RATE_RULE[optimizer_family(optimizer.name)],
        betas=optimizer.beta_rule or "none",
        decay=optimizer.decay_rule or "none",
    )
