"""Parts of a run, built from its settings: the meter with its hook, the ledger, the micro-batch that fits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.optim import Optimizer

from dptrain.config.built import measurement_interval, smoothing
from dptrain.config.train_config import TrainConfig
from dptrain.cost.device_peaks import matmul_precision, peak_flops_per_s
from dptrain.cost.flop_density import flop_density
from dptrain.cost.ledger import Ledger
from dptrain.errors import ConfigError, ObservationError
from dptrain.exchange import Exchange, RunningStatistics
from dptrain.models.expert_parallel import expert_shares
from dptrain.models.sparsity import densities, sparse_parameters
from dptrain.observe import DdpCommHook, Meter, ParameterHook
from dptrain.observe.groups import Groups, resolve_groups
from dptrain.observe.hooks.base import GradientHook
from dptrain.observe.hooks.experts import ExpertParallelHook
from dptrain.observe.hooks.null import NullHook
from dptrain.runtime.rendezvous import collective_timeout_s
from dptrain.runtime.replica import num_replicas, rank_of_replica
from dptrain.runtime.replica_check import ReplicaCheck, compared_tensors
from dptrain.runtime.step_reduction import broadcast_from_rank_0
from dptrain.tasks import Task
from dptrain.train.checkpoint_schedule import Sharding
from dptrain.train.execution.loss_scale import LossScale
from dptrain.train.execution.master_weights import MasterWeights
from dptrain.train.execution.update import Update
from dptrain.train.execution.wrapping import autocast, autocast_dtype, is_distributed, num_shards
from dptrain.train.memory import find_micro_batch_size
from dptrain.train.optimizer import num_states

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel


_SHARD_PATIENCE = 0.8
"""Time that rank 0 waits for the shards of others, of what they wait for it in the collective at the end of a run."""


def build_meter(
    config: TrainConfig,
    *,
    model: nn.Module,
    bare_model: nn.Module,
    device: torch.device,
    loss_scale: LossScale | None,
    exchange: Exchange,
    population: int,
) -> Meter:
    """Return the meter of a run, with its hook on the model.

    Args:
        config: filled in.
        model: wrapped.
        bare_model: inside of it.
        device: of this replica.
        loss_scale: of float16 training.
        exchange: may have no noise scale, or a communication hook to go round.
        population: samples in the training data.

    Raises:
        ConfigError: where the hook that is asked for sees nothing of such a model, or it has no experts.
    """
    groups = _groups(config, bare_model)
    trained = (name for name, parameter in bare_model.named_parameters() if parameter.requires_grad)
    num_parts = [exchange.part_of(name)[1] for name in trained]
    hook = _hook(
        config,
        model=model,
        bare_model=bare_model,
        groups=groups,
        num_parts=num_parts,
        device=device,
        exchange=exchange,
    )
    return Meter(
        bare_model.parameters(),
        hook=hook,
        loss_scale=None if loss_scale is None else loss_scale.current,
        groups=groups.counted_once(num_parts),
        num_shards=num_shards(bare_model),
        smoothing=smoothing(config),
        level=config.noise.level,
        population=population,
        interval_rule=measurement_interval(config),
    )


def _groups(config: TrainConfig, model: nn.Module) -> Groups:
    groups = config.noise.groups
    if isinstance(groups, bool):
        return resolve_groups("module" if groups else None, model=model)
    try:
        return resolve_groups(groups, model=model)
    except ObservationError as error:
        needed = {
            "experts": "modules called 'experts' in the model, as task gpt has with num_experts",
            "local_blocks": "parts of the model with losses of their own, as task gpt has with local_blocks",
        }
        raise ConfigError(
            f"noise.groups={groups} needs {needed[groups]}: leave it out, or give noise.groups=true for first-level "
            f"modules"
        ) from error


def _hook(
    config: TrainConfig,
    *,
    model: nn.Module,
    bare_model: nn.Module,
    groups: Groups,
    num_parts: Sequence[int],
    device: torch.device,
    exchange: Exchange,
) -> GradientHook:
    if config.control.mode == "off" or exchange.no_noise_scale is not None:
        return NullHook(device, num_entries=groups.num_entries)
    if is_distributed(bare_model):
        from dptrain.observe.hooks.fsdp import FsdpHook

        if config.noise.observer == "hook":
            raise ConfigError(
                f"noise.observer=hook is DDP's communication hook, but execution.wrapper is "
                f"{config.execution.wrapper}: use noise.observer=parameters"
            )
        return FsdpHook(bare_model, groups=groups)
    if max(num_parts, default=1) > 1:
        shares = expert_shares(bare_model)
        return ExpertParallelHook(bare_model.parameters(), num_parts=num_parts, shares=shares, groups=groups)
    if config.noise.observer == "parameters":
        return ParameterHook(bare_model.parameters(), groups=groups)
    if num_replicas() == 1:  # which may be wrapped all the same
        raise ConfigError("noise.observer=hook needs at least two replicas: use noise.observer=parameters")
    return DdpCommHook(cast("DistributedDataParallel", model), groups=groups, comm_hook=exchange.hook())


def build_update(
    config: TrainConfig,
    model: nn.Module,
    *,
    optimizer: Optimizer,
    loss_scale: LossScale | None,
    masters: MasterWeights | None,
) -> Update:
    """Return what makes a step of gradients, for a wrapped model."""
    return Update(
        [p for p in model.parameters() if p.requires_grad],
        optimizer=optimizer,
        max_grad_norm=config.optimizer.max_grad_norm,
        loss_scale=loss_scale,
        masters=masters,
    )


def sharding(device: torch.device) -> Sharding:
    """Return who saves where parameters are sharded: all ranks, and rank 0 waits for less than a collective does."""
    return Sharding(
        rank=rank_of_replica(),
        num_ranks=num_replicas(),
        agree=partial(broadcast_from_rank_0, device=device),
        patience_s=_SHARD_PATIENCE * collective_timeout_s(),
    )


def build_replica_check(
    config: TrainConfig, model: nn.Module, *, statistics: RunningStatistics, exchange: Exchange
) -> ReplicaCheck:
    """Return what compares the replicas of a run, at moments at which they must be equal.

    Args:
        config: filled in.
        model: not wrapped.
        statistics: of the model, which replicas combine.
        exchange: says when replicas may differ.
    """
    shards = is_distributed(model)  # which differ by design
    return ReplicaCheck(
        compared_tensors(model, also=statistics.buffer_names()),
        every_steps=config.replica_check_every_steps,
        may_differ=lambda: shards or exchange.may_differ,
        part_of=exchange.part_of,
    )


def build_ledger(config: TrainConfig, *, task: Task, device: torch.device) -> Ledger:
    """Return the ledger of a run."""
    density = None
    if config.sparsity.method != "off":
        density = flop_density(task, densities(sparse_parameters(task.model, config.sparsity), config.sparsity))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    precision = matmul_precision(device, mixed_precision=config.precision)
    return Ledger(
        world_size=num_replicas(),
        peak_flops_per_s=peak_flops_per_s(name, precision=precision),
        price_per_device_hour=config.log.price_per_device_hour,
        density=density,
    )


def fitting_micro_batch_size(task: Task, config: TrainConfig, *, smallest: int, device: torch.device) -> int:
    """Find by trying what fits into the memory of all GPUs. Without one the task's size will do: hosts swap."""
    on_host = device.type == "cpu"
    return find_micro_batch_size(
        task,
        smallest=smallest,
        largest=task.suggestion.micro_batch_size if on_host else len(task.train_data),  # type: ignore[arg-type]
        device=device,
        num_states=num_states(config.optimizer),
        precision=partial(autocast, device, dtype=autocast_dtype(config.precision)),
    )
