"""What to write in place of options that other tools have, such as --lr; the nearest spelling is found elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

from dptrain.cli.spelling import is_option
from dptrain.errors import ConfigError

_BATCH = (
    "the batch of all replicas together is --global-batch-size {value}; one forward-backward on one replica is "
    "--micro-batch-size"
)
_REPLICAS = "the number of processes, one per GPU, is --replicas {value}"
_RATE = "the learning rate is --optimizer.learning-rate {value}"
_STEPS = (
    "a run is as long as --max-samples says; with a constant batch (--control.law constant) --max-steps {value} works"
)
_ACCUMULATION = (
    "accumulation steps follow from the batch: --global-batch-size = --micro-batch-size × accumulation steps × replicas"
)
_COMPILE = "torch.compile is --execution.compile model, or blocks"
_FP16 = "half precision is --precision fp16 (with a loss scale), or --precision bf16"
_BF16 = "half precision is --precision bf16"
_WANDB = "the tracker is --log.tracker wandb, with --log.project NAME"
_OUT = "the folder of the run is --run-dir {value}"
_DATA = "data and model come with the task: --task NAME, or --task path/to/file.py:function for your own"
_BETA1 = "momentum is --optimizer.beta1 {value}"
_CLIP = "the gradient is clipped to --optimizer.max-grad-norm {value}"
_SAVE = "checkpoints are written every --checkpoint.every-samples N"
_WARMUP = "the warm-up is counted in samples: --optimizer.warmup-samples N"
_EVAL = "evaluations are counted in samples: --log.eval-every-samples N"

_STATIC = (
    "DDP's static_graph is not used, since it fails under no_sync: a model that recomputes activations needs none with "
    "use_reentrant=False, or --execution.activation-checkpointing blocks"
)

_HINTS: Mapping[str, str] = {
    **dict.fromkeys(("batch", "batch_size", "bs", "train_batch_size", "per_device_train_batch_size"), _BATCH),
    **dict.fromkeys(("gpus", "num_gpus", "ngpus", "devices", "nproc", "nproc_per_node", "world_size"), _REPLICAS),
    **dict.fromkeys(("num_processes", "nproc_per_gpu", "workers_per_node"), _REPLICAS),
    **dict.fromkeys(("lr", "base_lr", "max_lr"), _RATE),
    **dict.fromkeys(("steps", "num_steps", "iterations", "iters", "max_iters", "num_iterations"), _STEPS),
    **dict.fromkeys(("accumulation_steps", "gradient_accumulation_steps", "grad_accum", "accum"), _ACCUMULATION),
    **dict.fromkeys(("compile", "torch_compile"), _COMPILE),
    **dict.fromkeys(("fp16", "half", "float16"), _FP16),
    **dict.fromkeys(("bf16", "amp", "autocast", "mixed_precision", "bfloat16"), _BF16),
    **dict.fromkeys(("wandb", "use_wandb", "wandb_project", "report_to"), _WANDB),
    **dict.fromkeys(("out", "out_dir", "output", "output_dir", "save_dir", "log_dir", "logdir"), _OUT),
    **dict.fromkeys(("data", "dataset", "data_dir", "data_path", "model", "arch", "model_name"), _DATA),
    **dict.fromkeys(("momentum",), _BETA1),
    **dict.fromkeys(("clip", "grad_clip", "clip_grad", "clip_grad_norm", "gradient_clipping"), _CLIP),
    **dict.fromkeys(("save_every", "save_steps", "save_interval", "checkpoint_every"), _SAVE),
    **dict.fromkeys(("warmup", "warmup_steps", "num_warmup_steps", "warmup_ratio"), _WARMUP),
    **dict.fromkeys(("static_graph", "ddp_static_graph", "execution.static_graph"), _STATIC),
    **dict.fromkeys(("eval_every", "eval_interval", "eval_steps"), _EVAL),
}
"""By the option's name with underscores. It counts only where there is no option of that name."""

_EPOCHS = ("epochs", "num_epochs", "num_train_epochs", "max_epochs", "n_epochs")


def refuse_other_tools(
    arguments: Sequence[str], *, known: Collection[str], num_samples: Callable[[Sequence[str]], tuple[str, int] | None]
) -> None:
    """Refuse the first option that other tools have and dptrain has not, with what to write instead.

    Args:
        arguments: with underscores in the names of options.
        known: names of the options that exist.
        num_samples: returns the task's name and the length of its training data for the other arguments, or None
            where the task cannot be built.

    Raises:
        ConfigError: with the right option.
    """
    for at, argument in enumerate(arguments):
        name, equals, value = argument[2:].partition("=") if is_option(argument) else ("", "", "")
        follows = arguments[at + 1 : at + 2] if name and not equals else []
        taken = [text for text in follows if not is_option(text)]
        value = value or next(iter(taken), "")
        if name in known or not name:
            if name == "task_options" and re.match(r"\w+=", value):
                raise ConfigError(_options_of_task(value))
        elif name in _EPOCHS:
            others = [*arguments[:at], *arguments[at + 1 + len(taken) :]]
            raise ConfigError(_in_samples(argument.partition("=")[0], value, num_samples(others)))
        elif name in _HINTS:
            shown = argument.partition("=")[0].replace("_", "-")
            raise ConfigError(f"there is no option {shown}: {_HINTS[name].format(value=value or 'N').strip()}")


def _options_of_task(text: str) -> str:
    name, _, value = text.partition("=")
    return f"--task-options {text} is not YAML: write --task-options.{name} {value.partition(',')[0]}"


def _in_samples(option: str, value: str, task: tuple[str, int] | None) -> str:
    start = f"there is no option {option.replace('_', '-')}: the length of a run is counted in samples"
    try:
        epochs = float(value)
    except ValueError:
        epochs = 0.0
    if task is None or not 0 < epochs < float("inf"):
        return f"{start}; write --max-samples (epochs × samples in the training data)"
    name, samples = task
    return f"{start}; {value} × {samples:,} samples of {name} are --max-samples {max(1, round(epochs * samples))}"
