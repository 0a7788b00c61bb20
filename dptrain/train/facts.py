"""The facts of a run, taken from its task and its device."""

from __future__ import annotations

import torch

from dptrain.checkpoint.opened import Checkpoint
from dptrain.exchange import Exchange
from dptrain.tasks import Task
from dptrain.tracking.run_facts import RunFacts
from dptrain.train.run_progress import start_of


def facts_of(
    task: Task,
    *,
    num_samples: int,
    exchange: Exchange,
    device: torch.device,
    saved: Checkpoint | None = None,
    branch: Checkpoint | None = None,
) -> RunFacts:
    """Return the facts of a run; held-out samples are counted over all sets, parameters over all parts of them.

    Args:
        task: of the run.
        num_samples: of its training data.
        exchange: what its replicas send one another.
        device: of this replica.
        saved: checkpoint of its own that it goes on from.
        branch: checkpoint of another run that it begins at.
    """
    parts = [(p, exchange.part_of(name)[1]) for name, p in task.model.named_parameters()]
    trained = [(p, number) for p, number in parts if p.requires_grad]
    held_out = [len(data) for data in task.eval_sets.values()]  # type: ignore[arg-type]
    return RunFacts(
        task=task.name,
        num_parameters=sum(p.numel() * number for p, number in parts),
        num_trained_parameters=sum(p.numel() * number for p, number in trained),
        gradient_bytes=sum(p.numel() * p.element_size() for p, _ in trained),
        num_samples=num_samples,
        num_held_out=sum(held_out) if held_out else None,
        world_size=exchange.num_replicas,
        device=device.type,
        device_name=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        torch_version=torch.__version__,
        tokens_per_sample=task.tokens_per_sample,
        start_samples=start_of(saved=saved, branch=branch),
    )
