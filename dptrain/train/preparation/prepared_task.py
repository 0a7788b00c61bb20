"""The task that is trained: the one that was asked for, with its model adapted and a teacher in its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dptrain.config.tokens import in_samples
from dptrain.config.train_config import TrainConfig
from dptrain.errors import ConfigError
from dptrain.models.adaptation import adapt_model
from dptrain.models.gpt import Gpt
from dptrain.models.settings import DistillationConfig
from dptrain.runtime.replica import rank_of_replica
from dptrain.tasks import Task, check_evaluation, check_task, resolve_task, warn_unless_mean
from dptrain.tasks.check import CheckedLoss
from dptrain.train.preparation.distillation import DistilledLoss, check_logits
from dptrain.train.preparation.hidden_states import hidden_states
from dptrain.train.preparation.layer_rates import with_layer_rates
from dptrain.train.preparation.quantized_layers import check_quantized_layers
from dptrain.train.preparation.teacher import digest_of, load_teacher
from dptrain.train.preparation.weights import read_weights


def requested(task: Task | Callable[..., Task] | None, config: TrainConfig) -> tuple[Task, TrainConfig]:
    """Return the task that was asked for, and the settings in its samples where they were given in tokens.

    Args:
        task: as given to the trainer; None for the one that the settings name.
        config: of the run.

    Raises:
        ConfigError: where tokens are given and samples are not made of them.
        TaskError: where the task cannot be built.
    """
    if not isinstance(task, Task):
        task = resolve_task(task or config.task, options=config.task_options)
    return task, in_samples(config, tokens_per_sample=task.tokens_per_sample, task=task.name)


def prepared(task: Task, config: TrainConfig, *, is_resumed: bool = False) -> tuple[Task, CheckedLoss]:
    """Return the task as the settings want it, checked, and what was found out about its loss.

    The model is changed in place. Held-out figures stay the task's own.

    Args:
        task: as it was asked for.
        config: the settings; what a resumed run leaves open is that of the saved one.
        is_resumed: parameters come from a checkpoint of the run, so what it started from need no longer be there.

    Raises:
        ConfigError: where settings and model do not fit.
        TaskError: where there is a teacher, and the task does not do what is needed of it.
        CheckpointError: where weights come from a run none of whose checkpoints can be trusted.
    """
    read = (lambda _: task.model.state_dict()) if is_resumed else read_weights
    adapt_model(task.model, config.model, read=read)
    if config.model.layer_decay is not None:
        task = with_layer_rates(task, decay=config.model.layer_decay)
    if config.distillation.teacher is not None:
        task = _taught(task, config.distillation)
    loss = check_task(task)
    if config.model.quantize is not None:
        check_quantized_layers(task)
    check_evaluation(task)
    if rank_of_replica() == 0:
        warn_unless_mean(task)
    return task, loss


def _taught(task: Task, config: DistillationConfig) -> Task:
    if isinstance(task.model, Gpt) and task.model.config.local_blocks > 1:
        raise ConfigError("a teacher would teach the last local block alone: leave out local_blocks or the teacher")
    teacher = load_teacher(Path(str(config.teacher)).expanduser())
    check_task(task)
    check_logits(task)
    hidden = config.hidden and hidden_states(
        config.hidden, weight=config.hidden_weight, model=task.model, teacher=teacher
    )
    loss = DistilledLoss(
        task.loss, teacher, temperature=config.temperature, weight=config.weight, hidden=hidden or None
    )
    digests = {**task.digests, "the teacher": digest_of(teacher)}
    return replace(task, loss=loss, eval_loss=task.eval_loss or task.loss, digests=digests)
