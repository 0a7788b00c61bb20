"""The facts of a run, taken from its task and its device."""

from __future__ import annotations

import torch

from dptrain.exchange import Exchange
from dptrain.tasks import Task
from dptrain.tracking.run_facts import RunFacts


def facts_of(task: Task, *, num_samples: int, exchange: Exchange, device: torch.device) -> RunFacts:
    """Return the facts of a run; held-out samples are counted over all sets, parameters over all parts of them."""
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
    )
