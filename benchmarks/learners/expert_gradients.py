"""Whether the gradients of experts, averaged over replicas, are those of one process with all samples."""

from __future__ import annotations

import torch

from benchmarks.replicas import run_replicas
from dptrain.models.experts import ExpertsConfig
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.tasks.base import split_loss
from dptrain.tasks.gpt import next_token_loss


def experts_gradient_error(world_size: int) -> float:
    """Return the largest error of the replicas' mean gradient of a GPT of experts, over its largest component.

    The reference is one process with all samples; routing, capacity and balance are counted within a sequence.
    """
    model, windows = _experts(8)
    loss, _ = split_loss(next_token_loss(model, windows, balance_weight=0.01))
    loss.backward()  # type: ignore[no-untyped-call] # torch declares no types for it
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found = torch.tensor(run_replicas(_gradient_of_share, world_size=world_size))
    return float((found - expected).abs().max() / expected.abs().max())


def _experts(num_windows: int) -> tuple[Gpt, torch.Tensor]:
    torch.manual_seed(0)
    experts = ExpertsConfig(num_experts=4, top_k=2, capacity_factor=1.25)
    model = Gpt(GptConfig(width=32, depth=1, context=16, experts=experts)).train()
    for parameter in model.parameters():  # blocks begin as the identity, where experts have no gradient
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randint(0, 256, (num_windows, 17))


def _gradient_of_share(rank: int, world_size: int) -> list[float]:
    from torch.nn.parallel import DistributedDataParallel

    model, windows = _experts(8)
    share = windows.chunk(world_size)[rank]
    replica = DistributedDataParallel(model)  # has a name: let go before the backward pass, it would average nothing
    loss, _ = split_loss(next_token_loss(replica, share, balance_weight=0.01))
    loss.backward()  # type: ignore[no-untyped-call] # torch declares no types for it
    return [float(value) for p in model.parameters() if p.grad is not None for value in p.grad.flatten()]
