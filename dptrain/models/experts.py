"""A mixture-of-experts feed-forward layer: each token is processed by the few experts that a router picks for it.

References: Shazeer et al. 2017 (arXiv 1701.06538), top-k routing; Fedus et al. 2021 (arXiv 2101.03961), capacity and
load-balancing loss; Gale et al. 2022 (arXiv 2211.15841), experts of unequal load in one grouped product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dptrain.errors import ConfigError
from dptrain.models.expert_parallel import ExpertShare, feed_forward

if TYPE_CHECKING:
    import torch.distributed as dist

_MAX_TOP_K = 2


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Shape of a mixture of experts.

    Attributes:
        num_experts: feed-forward networks per layer, at least 2.
        top_k: experts that process a token, 1 or 2.
        capacity_factor: each expert takes at most ⌈factor × tokens × top_k / num_experts⌉ tokens of a sequence, the
            earlier ones; the others pass by it. None: every token is processed by all of its experts.
        balance_weight: of the load-balancing loss in the training loss.
    """

    num_experts: int
    top_k: int = 2
    capacity_factor: float | None = None
    balance_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.num_experts < _MAX_TOP_K or not 1 <= self.top_k <= _MAX_TOP_K:
            raise ConfigError(
                f"a mixture needs at least 2 experts and routes to 1 or 2 of them, got num_experts "
                f"{self.num_experts} and top_k {self.top_k}"
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ConfigError(f"capacity_factor must be positive and finite, got {self.capacity_factor}")
        if not 0 <= self.balance_weight < math.inf:
            raise ConfigError(f"balance_weight must be at least 0 and finite, got {self.balance_weight}")


class Routing(NamedTuple):
    """What a layer's router did with a micro-batch; of a model, a row for each layer and the mean balance.

    Attributes:
        balance: load-balancing loss, a scalar with a graph; 1 at perfect balance.
        samples: share of the samples that each expert processed a token of, shape (num_experts,).
        tokens: share of the tokens that each expert processed, shape (num_experts,); top_k in all without a capacity.
    """

    balance: Tensor
    samples: Tensor
    tokens: Tensor


class MixtureOfExperts(nn.Module):
    """Sum over a token's experts of gate × expert(token), with a load-balancing loss.

    Routing, capacity and balance are counted within each sequence. What a sample contributes to the loss then does not
    depend on the samples beside it, so the loss stays a mean over samples and the noise scale keeps its meaning.

    Args:
        config: number of experts and routing.
        width: of a token; a multiple of 8, as the grouped matrix product needs it.
        hidden: inner width of an expert; a multiple of 8.
    """

    def __init__(self, config: ExpertsConfig, *, width: int, hidden: int) -> None:
        super().__init__()
        if width % 8 or hidden % 8:
            raise ConfigError(f"experts need widths that are multiples of 8, got {width} and {hidden}")
        self.config = config
        self.router = nn.Linear(width, config.num_experts, bias=False)
        self.weight_in = nn.Parameter(torch.empty(config.num_experts, width, hidden))
        self.weight_out = nn.Parameter(torch.zeros(config.num_experts, hidden, width))
        self.share: ExpertShare | None = None
        nn.init.normal_(self.weight_in, std=width**-0.5)
        nn.init.normal_(self.router.weight, std=0.02)

    @property
    def num_experts(self) -> int:
        """Experts of the layer, on all ranks together."""
        return self.config.num_experts

    @property
    def own_experts(self) -> range:
        """Those that are stacked along the first dimension of the weights: all, unless they are shared out."""
        return range(self.num_experts) if self.share is None else self.share.experts

    def share_out(self, group: dist.ProcessGroup) -> tuple[str, ...]:
        """Keep the experts of this rank alone; from now on tokens go to the ranks of the group that have theirs.

        All ranks must have the same weights before. The parameters are new objects.

        Returns:
            The names of the parameters of which this rank has a part, along the first dimension.

        Raises:
            ConfigError: where the experts cannot be shared equally.
        """
        self.share = ExpertShare(group, num_experts=self.num_experts)
        own = slice(self.share.experts.start, self.share.experts.stop)
        for name in ("weight_in", "weight_out"):
            whole: nn.Parameter = getattr(self, name)
            setattr(self, name, nn.Parameter(whole.detach()[own].clone(), requires_grad=whole.requires_grad))
        return "weight_in", "weight_out"

    def forward(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """Return the layer's output, shape (samples, length, width), and how tokens were routed."""
        samples, length, width = tokens.shape
        experts, top_k = self.config.num_experts, self.config.top_k
        # In float32 also under autocast: bf16 logits tie, and a tie is routed by the order of the experts.
        with torch.autocast(tokens.device.type, enabled=False):
            shares = functional.linear(tokens.float(), self.router.weight.float()).softmax(-1)
        gates, chosen = shares.topk(top_k, dim=-1)
        if top_k > 1:
            gates = gates / gates.sum(-1, keepdim=True)
        balance = _balance_loss(shares, chosen)
        places = chosen.flatten(1)  # (samples, length × top_k), in the order of the tokens
        if self.config.capacity_factor is not None:
            capacity = math.ceil(self.config.capacity_factor * length * top_k / experts)
            places = torch.where(_rank_in_expert(places, experts) < capacity, places, experts)
        with torch.no_grad():
            taken = (places[..., None] == torch.arange(experts, device=places.device)).sum(1)
            routing = Routing(balance, (taken > 0).float().mean(0), taken.float().mean(0) / length)
        order = places.flatten().argsort(stable=True)
        rows = order // top_k
        # Rows of tokens that went to no expert come last and are not computed, neither forward nor backward: what is in
        # their memory must reach neither the output nor, through the gradient, the layers below.
        kept = (places.flatten()[order] < experts)[:, None]
        found = self._experts(torch.where(kept, tokens.reshape(-1, width)[rows], 0), places.flatten())
        weighted = torch.where(kept, found, 0) * gates.flatten()[order][:, None].to(found.dtype)
        out = torch.zeros(samples * length, width, dtype=weighted.dtype, device=weighted.device)
        return out.index_add(0, rows, weighted).view(samples, length, width), routing

    def _experts(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Apply to each row its expert; rows are sorted by expert, `places` are not."""
        ids = torch.arange(self.config.num_experts, device=places.device)
        # Compared, not bincount, whose output size the host would have to know first.
        counts = (places[:, None] == ids).sum(0)
        # Autocast does not know the grouped product.
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        apply = feed_forward if self.share is None else self.share
        return apply(tokens.to(dtype), counts, (self.weight_in, self.weight_out))


def _balance_loss(shares: Tensor, chosen: Tensor) -> Tensor:
    """Mean over sequences of experts × Σ over experts of (part of the tokens) × (mean share): arXiv 2101.03961, (4)."""
    num_experts = shares.shape[-1]
    parts = functional.one_hot(chosen, num_experts).to(shares.dtype).mean((1, 2))
    return num_experts * (parts * shares.mean(1)).sum(-1).mean()


def _rank_in_expert(places: Tensor, num_experts: int) -> Tensor:
    """Return how many earlier places of the same sequence have the same expert."""
    one_hot = functional.one_hot(places, num_experts)
    return (one_hot.cumsum(1) * one_hot).sum(-1) - 1
