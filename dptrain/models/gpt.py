"""A decoder-only transformer of several sizes: RMS norms, rotary or learned positions, three kinds of feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dptrain.errors import ConfigError
from dptrain.models.experts import ExpertsConfig, MixtureOfExperts, Routing

FeedForwardKind = Literal["gelu", "relu2", "swiglu"]
Angles = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary angles, each of shape (length, head width / 2)."""


@dataclass(frozen=True, kw_only=True)
class GptConfig:
    """Shape of a model.

    Attributes:
        vocab_size: number of token values.
        context: tokens that a prediction may look back on; the length of the table of learned positions.
        width: of the residual stream.
        depth: number of blocks.
        heads: number of attention heads.
        positions: rotary (Su et al. 2021, arXiv 2104.09864), or a learned table.
        feed_forward: gelu, relu2 (squared ReLU; So et al. 2021, arXiv 2109.08668) or swiglu (Shazeer 2020,
            arXiv 2002.05202; 8/3 of the width instead of 4, which costs as many parameters).
        tied: one matrix for the embedding and the output.
        experts: a mixture of experts in place of every feed-forward layer.
        local_blocks: parts into which the blocks are divided, each with a head and a loss of its own and no backward
            pass between them (Belilovsky et al. 2019, arXiv 1901.08164; Laskin, Metz et al. 2020, arXiv 2012.03837).
            The last one's head is the model's output. 1: one loss for the whole model.
    """

    vocab_size: int = 256
    context: int = 64
    width: int = 128
    depth: int = 2
    heads: int = 4
    positions: Literal["rotary", "learned"] = "rotary"
    feed_forward: FeedForwardKind = "gelu"
    tied: bool = False
    experts: ExpertsConfig | None = None
    local_blocks: int = 1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "width", "depth", "heads", "local_blocks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name, allowed in (("positions", ("rotary", "learned")), ("feed_forward", ("gelu", "relu2", "swiglu"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        unit = 2 * self.heads if self.positions == "rotary" else self.heads
        if self.width % unit:
            why = " (rotary positions turn pairs of components within a head)" if self.positions == "rotary" else ""
            factor = "2 × heads" if self.positions == "rotary" else "heads"
            raise ConfigError(f"width must be a multiple of {factor} = {unit}{why}, got {self.width}")
        if self.local_blocks > self.depth:
            raise ConfigError(f"local_blocks must be at most depth = {self.depth}, got {self.local_blocks}")
        if self.local_blocks > 1 and self.tied:
            raise ConfigError(
                f"with local_blocks = {self.local_blocks} the embedding is trained by the first loss and the output by "
                f"the last, so they cannot be one matrix: give tied=false"
            )


SIZES: Mapping[str, GptConfig] = MappingProxyType(
    {
        "tiny": GptConfig(),
        # Widths and depths of GPT-2 (Radford et al. 2019); 50,257 tokens filled up to a multiple of 64, so that the
        # output's matrix product has no ragged edge.
        "124m": GptConfig(vocab_size=50304, context=1024, width=768, depth=12, heads=12, tied=True),
        "350m": GptConfig(vocab_size=50304, context=1024, width=1024, depth=24, heads=16, tied=True),
        "1.5b": GptConfig(vocab_size=50304, context=1024, width=1600, depth=48, heads=25, tied=True),
    }
)
"""Ready-made shapes by name; the name is the number of parameters."""


class Predictions(NamedTuple):
    """What a model returns where there is more than logits.

    Attributes:
        logits: of the output, shape (samples, length, vocab_size).
        routing: how tokens were routed, where there are experts: the mean balance loss of the blocks, and shares of
            shape (depth, num_experts).
        local_logits: of the heads of the local blocks but the last, in training.
    """

    logits: Tensor
    routing: Routing | None = None
    local_logits: tuple[Tensor, ...] = ()


class Gpt(nn.Module):
    """A causal pre-norm transformer without biases.

    Args:
        config: its shape.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        ends = [-(-config.depth * part // config.local_blocks) for part in range(1, config.local_blocks)]
        # By the number of the block that each follows. No ModuleList: with many tokens it would have more parameters
        # than the blocks, and `find_blocks` would take the heads for them. Before the output, which is the last layer.
        self.local_heads = nn.ModuleDict({str(end - 1): LocalHead(config) for end in ends})
        self._ends = frozenset(end - 1 for end in ends)
        self.norm = nn.RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        # The first norm divides a small embedding by its size and multiplies its gradient by as much. At 0.02 the first
        # |G|² is 7,000 times that of 2,000 samples later, which any smoothing remembers for long; at 0.25 it is 400
        # times, for 0.06 bits per byte after 10,000 samples of pysource (2.44 against 2.38).
        nn.init.normal_(self.embedding.weight, std=0.25)
        # Small, so that training starts from a uniform guess.
        nn.init.normal_(self.output.weight, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        if config.tied:
            self.embedding.weight = self.output.weight

    def forward(self, tokens: Tensor) -> Tensor | Predictions:
        """Predict the token after each.

        Args:
            tokens: integers, shape (samples, length).

        Returns:
            Logits, shape (samples, length, vocab_size); `Predictions` with experts, and with local blocks in training.
        """
        length = tokens.shape[1]
        stream = self.embedding(tokens)
        angles = None
        if self.positions is None:
            angles = _angles(length, self.config.width // self.config.heads, device=tokens.device)
        else:
            if length > self.config.context:
                raise ValueError(f"{length} tokens are more than the {self.config.context} learned positions")
            stream = stream + self.positions.weight[:length]
        found: list[Routing] = []
        local_logits: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            stream, routing = block(stream, angles)
            if routing is not None:
                found.append(routing)
            if number in self._ends:
                if self.training:
                    local_logits.append(self.local_heads[str(number)](stream))
                stream = stream.detach()
        logits: Tensor = self.output(self.norm(stream))
        if not found and not local_logits:
            return logits
        return Predictions(logits, _of_all_blocks(found), tuple(local_logits))

    def local_blocks(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that each local block's loss trains, by `local_blocks.0`, …; of one block, all."""
        found: list[list[nn.Parameter]] = [[]]
        found[0] += [p for part in (self.embedding, self.positions) if part is not None for p in part.parameters()]
        for number, block in enumerate(self.blocks):
            found[-1] += block.parameters()
            if number in self._ends:
                found[-1] += self.local_heads[str(number)].parameters()
                found.append([])
        # A tied output is the embedding.
        found[-1] += [
            p for part in (self.norm, self.output) for p in part.parameters() if p is not self.embedding.weight
        ]
        return {f"local_blocks.{number}": members for number, members in enumerate(found)}

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


class LocalHead(nn.Module):
    """Predicts from the stream after a local block: a norm and a linear layer, like the model's output.

    Args:
        config: shape of the model.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        nn.init.normal_(self.output.weight, std=0.02)

    def forward(self, stream: Tensor) -> Tensor:
        """Return logits, shape (samples, length, vocab_size)."""
        logits: Tensor = self.output(self.norm(stream))
        return logits


def output_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of any model whose outputs are logits: the last one, and the heads of local blocks."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return last + [module.output for module in model.modules() if isinstance(module, LocalHead)]


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    Args:
        config: shape of the model.
    """

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.feed_forward = config.feed_forward
        self.attention_norm = nn.RMSNorm(width)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        reads, writes = [self.attention_in], [self.attention_out]
        if config.experts is not None:
            self.experts = MixtureOfExperts(config.experts, width=width, hidden=4 * width)
        else:
            hidden, fan_out = _hidden_width(config)
            self.mlp_in = nn.Linear(width, fan_out, bias=False)
            self.mlp_out = nn.Linear(hidden, width, bias=False)
            reads.append(self.mlp_in)
            writes.append(self.mlp_out)
        # A block reads at unit scale and starts as the identity: 0.09 bits per byte better after 10,000 samples of
        # pysource than writing with small random weights (2.48 against 2.57).
        for layer in reads:
            nn.init.normal_(layer.weight, std=width**-0.5)
        for layer in writes:
            nn.init.zeros_(layer.weight)

    def forward(self, stream: Tensor, angles: Angles | None) -> tuple[Tensor, Routing | None]:
        """Return the stream after the block, and how its experts were chosen where it has some."""
        stream = stream + self._attention(self.attention_norm(stream), angles)
        read = self.mlp_norm(stream)
        if hasattr(self, "experts"):
            update, routing = self.experts(read)
            return stream + update, routing
        return stream + self.mlp_out(_activated(self.mlp_in(read), kind=self.feed_forward)), None

    def _attention(self, stream: Tensor, angles: Angles | None) -> Tensor:
        samples, length, width = stream.shape
        heads = self.attention_in(stream).view(samples, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if angles is not None:
            query, key = _turned(query, angles), _turned(key, angles)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(samples, length, width))
        return out


def _of_all_blocks(found: list[Routing]) -> Routing | None:
    if not found:
        return None
    balance, samples, tokens = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Routing(balance.mean(), samples, tokens)


def _hidden_width(config: GptConfig) -> tuple[int, int]:
    """Return the inner width of the feed-forward layer and the number of values that its first matrix makes."""
    if config.feed_forward != "swiglu":
        return 4 * config.width, 4 * config.width
    # A multiple of 8, which tensor cores need, closest above 8/3 of the width.
    hidden = -(-8 * config.width // 24) * 8
    return hidden, 2 * hidden


def _activated(hidden: Tensor, *, kind: FeedForwardKind) -> Tensor:
    if kind == "gelu":
        return functional.gelu(hidden, approximate="tanh")
    if kind == "relu2":
        return functional.relu(hidden).square()
    gate, value = hidden.chunk(2, dim=-1)
    return functional.silu(gate) * value


def _angles(length: int, head_width: int, *, device: torch.device) -> Angles:
    """Return cosine and sine by which pairs of components turn, at rates from 1 down to 1/10,000.

    Once per forward pass, so that no buffer has to follow the model or be saved with it.
    """
    half = head_width // 2
    rates = 1e4 ** -(torch.arange(half, device=device) / half)
    angles = torch.arange(length, device=device)[:, None] * rates
    return angles.cos(), angles.sin()


def _turned(heads: Tensor, angles: Angles) -> Tensor:
    """Apply rotary positions to heads of shape (samples, heads, length, head width)."""
    cos, sin = (part.to(heads.dtype) for part in angles)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
