"""What a run and its exchange need of each other: parameters to begin with, samples that all replicas see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import default_collate

from dptrain.config.filled_in import largest_micro_batch_size
from dptrain.config.train_config import TrainConfig
from dptrain.data.iterable import StreamedSamples
from dptrain.data.source import SlotSource, seed_everything
from dptrain.errors import ConfigError, TaskError
from dptrain.exchange import Exchange, RunningStatistics, build_exchange
from dptrain.exchange.base import SharedLoss
from dptrain.models.adaptation import ReadWeights, adapt_model
from dptrain.tasks import Task, resolve_task
from dptrain.tasks.base import LossFunction, split_loss
from dptrain.train.execution.shared_samples import SharedStream, read_shared
from dptrain.train.preparation.distillation import DistilledLoss


def prepare_exchange(
    config: TrainConfig,
    model: nn.Module,
    *,
    statistics: RunningStatistics,
    task: Task | Callable[..., Task] | None,
    read: ReadWeights | None,
) -> Exchange:
    """Return the exchange of a run; the model then has the parameters that this replica begins with.

    Where replicas begin apart, each but rank 0 builds the task again, from a seed of its own.

    Args:
        config: the settings.
        model: as the task was built on all replicas.
        statistics: of the model.
        task: as the trainer was given it.
        read: reads the weights that the settings name; None where parameters come from a checkpoint of the run, so
            what it started from need no longer be there.

    Raises:
        TaskError: where the model has running statistics, and replicas go ways of their own.
        ConfigError: where replicas shall begin apart, and the task cannot be built again.
    """
    # DDP has one slot for a hook, and the meter's has this one inside where it measures there.
    takes_slot = config.noise.observer == "hook" and config.control.mode != "off"
    exchange = build_exchange(
        config.exchange,
        seed=config.seed,
        registers=not takes_slot,
        expert_parallel_size=config.execution.expert_parallel_size,
    )
    if statistics and not exchange.parameters_are_equal:
        raise TaskError(
            f"the model has batch norms, whose running statistics replicas of exchange.kind={exchange.name} cannot "
            f"share: use group or layer norms, or exchange.kind=all_reduce"
        )
    if exchange.begins_apart and exchange.num_replicas > 1:
        if isinstance(task, Task):
            raise ConfigError(
                f"with exchange.kind={exchange.name} each replica begins with parameters of its own, but the task was "
                f"given as built: give the function that builds it"
            )
        if exchange.rank > 0 and read is not None:
            seed_everything(config.seed + exchange.rank)
            other = resolve_task(task or config.task, options=config.task_options).model
            adapt_model(other, config.model, read=read)
            model.load_state_dict(other.state_dict())
            seed_everything(config.seed)
    return exchange


def shared_loss(
    task: Task,
    config: TrainConfig,
    *,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[object]],
    seed_forward: Callable[[int], None],
) -> SharedLoss:
    """Return what runs a model on training samples that depend on seed and step alone.

    So do all numbers that the dataset, its collation and the loss draw: replicas compare predictions of equal inputs,
    and those of a step are the same inputs whenever they are made.

    Args:
        task: of the run.
        config: filled in.
        device: of this replica.
        precision: makes the context of a forward pass.
        seed_forward: seeds the generators for the forward pass that begins at a position in the stream.
    """
    data: Any = task.train_data
    number = min(config.exchange.shared_samples or largest_micro_batch_size(config), len(data))
    # Predictions alone are compared, so a teacher has nothing to say here, and would cost a pass.
    own_loss: LossFunction = task.loss.__wrapped__ if isinstance(task.loss, DistilledLoss) else task.loss
    stream = SharedStream(len(data), seed=config.seed, num_drawn=number)
    source = SlotSource(data, stream=stream, collate=task.collate or default_collate)

    def loss(model: nn.Module, step: int) -> Tensor:
        """Return the mean loss of a model on the samples of a step, a scalar with its graph."""
        if isinstance(data, StreamedSamples):
            raise ConfigError("replicas cannot share samples of an iterable data set: use one with indices")
        batch = send_to_device(read_shared(source, step, num_drawn=number), device, non_blocking=True)
        seed_forward(-step)  # below 0, where no micro-batch begins; no rank in it, for a loss may change its inputs
        with precision():
            return split_loss(own_loss(model, batch))[0]

    return loss
