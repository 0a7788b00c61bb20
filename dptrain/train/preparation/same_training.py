"""Whether all replicas are about to train the same task, by the same settings, from the same checkpoint."""

from __future__ import annotations

import torch

from dptrain.checkpoint.opened import Checkpoint
from dptrain.config.train_config import TrainConfig
from dptrain.runtime.hosts.task_identity import TaskIdentity
from dptrain.runtime.startup_check import check_same_loss, check_same_run, model_digests
from dptrain.tasks import Task
from dptrain.tasks.check import CheckedLoss


def check_same_training(
    config: TrainConfig,
    task: Task,
    *,
    identity: TaskIdentity,
    loss: CheckedLoss,
    branch: Checkpoint | None,
    saved: Checkpoint | None,
    device: torch.device,
) -> None:
    """Compare the replicas before the first step. A collective.

    Args:
        config: filled in.
        task: prepared.
        identity: of its data and source.
        loss: what was found out about its loss.
        branch: the checkpoint to branch from.
        saved: the checkpoint to resume from.
        device: of this replica.

    Raises:
        DesyncError: with what differs, and on which replicas.
    """
    check_same_run(
        config,
        {
            **identity.subjects(),
            **model_digests(task.model),
            "the parameters that the loss does not use": sorted(loss.unused),
            "the parts that the loss returns": loss.parts,
            "whether the loss draws random numbers from numpy or random": loss.draws_beside_torch,
            "the checkpoint to branch from": None if branch is None else branch.step,
            "the checkpoint to resume from": None if saved is None else saved.step,
        },
        device=device,
    )
    for value in identity.losses:
        check_same_loss(value, device=device)
