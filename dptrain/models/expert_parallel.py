"""Experts that several ranks share out: their feed-forward network, and the way of tokens to theirs and back.

Expert parallelism as in Lepikhin et al. 2021 (GShard, arXiv 2006.16668): two all-to-all in the forward pass of a layer
and two in its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dptrain.errors import ConfigError

Weights = tuple[Tensor, Tensor]
"""Of the experts' two layers, stacked along the first dimension."""

Watch = Callable[[Tensor, int, Tensor], None]
"""(weights of this rank's experts, number of a rank, their gradient from that rank's samples alone)."""


def feed_forward(tokens: Tensor, counts: Tensor, weights: Weights) -> Tensor:
    """Return what the experts make of their tokens, shape (rows, width); rows past the last are whatever they are.

    Args:
        tokens: sorted by expert, shape (rows, width).
        counts: rows of each expert, on the device.
        weights: of the experts.
    """
    first, second = (weight.to(tokens.dtype) for weight in weights)
    if not len(tokens):  # the backward pass of the grouped product fails without rows (torch 2.13)
        return (tokens @ first[0]).relu().square() @ second[0]
    ends = counts.cumsum(0).to(torch.int32)
    hidden = functional.grouped_mm(tokens, first, offs=ends)
    return functional.grouped_mm(functional.relu(hidden).square(), second, offs=ends)


class ExpertShare:
    """Which experts of a layer this rank has, and what brings tokens to the experts of a group of ranks.

    Args:
        group: of ranks that have all experts together.
        num_experts: of the layer.

    Raises:
        ConfigError: where the experts cannot be shared equally.
    """

    def __init__(self, group: dist.ProcessGroup, *, num_experts: int) -> None:
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        if num_experts % self.num_ranks:
            raise ConfigError(
                f"execution.expert_parallel_size {self.num_ranks} does not divide num_experts {num_experts}: choose a "
                f"number of experts that is a multiple of it"
            )
        each = num_experts // self.num_ranks
        first = each * dist.get_rank(group)
        self.experts = range(first, first + each)
        self.watch: Watch | None = None
        self.rows = (0, 0)
        """Rows that this rank had for experts in the latest pass, and rows that its experts got."""

    def __call__(self, tokens: Tensor, counts: Tensor, weights: Weights) -> Tensor:
        """Return what `feed_forward` returns on one rank with all experts. A collective of the group.

        The tokens of each rank are a product of their own: a gradient of the weights is then the sum over ranks of
        one gradient each, which a meter can see, and which is the same to the last bit whether it looks or not.

        Args:
            tokens: of this rank, sorted by expert.
            counts: rows of each expert of the layer.
            weights: of this rank's experts.
        """
        from torch.distributed._functional_collectives import all_to_all_single_autograd  # no other run waits for it

        sent = counts.view(self.num_ranks, -1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        # The host waits here, for it must know how many rows go where.
        to_send, to_receive = torch.stack([sent.sum(1), received.sum(1)]).tolist()
        num_sent = sum(to_send)
        self.rows = len(tokens), sum(to_receive)
        arrived = all_to_all_single_autograd(tokens[:num_sent], to_receive, to_send, self.group)
        found = [
            feed_forward(part, counts_of_rank, self._of_rank(weights, rank))
            for rank, (part, counts_of_rank) in enumerate(zip(torch.split(arrived, to_receive), received, strict=True))
        ]
        back = all_to_all_single_autograd(torch.cat(found), to_send, to_receive, self.group)
        return functional.pad(back, (0, 0, 0, len(tokens) - num_sent))

    def _of_rank(self, weights: Weights, rank: int) -> Weights:
        """Return the weights under a name of their own, whose gradient is that of one rank's samples."""
        first, second = (weight.view_as(weight) for weight in weights)
        for alias, weight in ((first, weights[0]), (second, weights[1])):
            if self.watch is not None and alias.requires_grad:
                alias.register_hook(partial(self.watch, weight, rank))  # type: ignore[no-untyped-call]
        return first, second


def expert_shares(model: nn.Module) -> Sequence[ExpertShare]:
    """Return the shares of a model's layers; none where no experts are shared out."""
    shares = (getattr(module, "share", None) for module in model.modules())
    return [share for share in shares if isinstance(share, ExpertShare)]


def own_rows_ratio(model: nn.Module) -> float | None:
    """Return the rows that a rank had for experts in the latest pass, over those that its experts got.

    It turns the work of a rank's experts into that of a rank's tokens, whose sum over the ranks is the same and which
    every rank has alike. 1 where no experts are shared out; None where this rank's experts got nothing.
    """
    rows = [share.rows for share in expert_shares(model)]
    if not rows:
        return 1.0
    own, received = (sum(numbers) for numbers in zip(*rows, strict=True))
    return own / received if received else None
