"""Whether all replicas are about to train the same task, by the same settings, from the same checkpoint."""

from __future__ import annotations

import torch

from dptrain.checkpoint.opened import Checkpoint
from dptrain.config.train_config import TrainConfig
from dptrain.runtime.hosts.task_identity import TaskIdentity
from dptrain.runtime.startup_check import check_same_loss, check_same_run, model_digests
from dptrain.tasks import Task


def check_same_training(
    config: TrainConfig,
    task: Task,
    *,
    identity: TaskIdentity,
    unused: frozenset[str],
    branch: Checkpoint | None,
    saved: Checkpoint | None,
    device: torch.device,
) -> None:
    """Compare the replicas before the first step. A collective.

    Args:
        config: filled in.
        task: prepared.
        identity: of its data and source.
        unused: names of the parameters that its loss does not use.
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
            "the parameters that the loss does not use": sorted(unused),
            "the checkpoint to branch from": None if branch is None else branch.step,
            "the checkpoint to resume from": None if saved is None else saved.step,
        },
        device=device,
    )
    for loss in identity.losses:
        check_same_loss(loss, device=device)
