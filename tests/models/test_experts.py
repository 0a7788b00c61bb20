"""The mixture of experts: equal to a loop over tokens, whatever the load, and each sample by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from dptrain.errors import ConfigError
from dptrain.models.experts import ExpertsConfig, MixtureOfExperts, Routing

CONFIGS = [
    ExpertsConfig(num_experts=4, top_k=top_k, capacity_factor=factor)
    for top_k in (1, 2)
    for factor in (None, 1.25, 0.5)
]


def make_layer(config):
    torch.manual_seed(0)
    layer = MixtureOfExperts(config, width=16, hidden=32)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def one_token_at_a_time(layer, tokens):
    """Route, count and compute as the definition says."""
    config = layer.config
    out = torch.zeros_like(tokens)
    balance = 0.0
    taken = torch.zeros(len(tokens), config.num_experts)
    for sample, sequence in enumerate(tokens):
        capacity = math.inf
        if config.capacity_factor is not None:
            capacity = math.ceil(config.capacity_factor * len(sequence) * config.top_k / config.num_experts)
        load = [0] * config.num_experts
        wanted = torch.zeros(config.num_experts)
        shares = torch.stack([functional.softmax(layer.router(token), dim=-1) for token in sequence])
        for place, token in enumerate(sequence):
            gates, chosen = shares[place].topk(config.top_k)
            gates = gates / gates.sum() if config.top_k > 1 else gates
            for gate, expert in zip(gates, chosen.tolist(), strict=True):
                wanted[expert] += 1 / (len(sequence) * config.top_k)
                load[expert] += 1
                if load[expert] <= capacity:
                    taken[sample, expert] += 1
                    hidden = functional.relu(token @ layer.weight_in[expert]).square()
                    out[sample, place] += gate * (hidden @ layer.weight_out[expert])
        balance = balance + config.num_experts * (wanted * shares.mean(0)).sum() / len(tokens)
    return out, Routing(balance, (taken > 0).float().mean(0), taken.mean(0) / tokens.shape[1])


@pytest.mark.parametrize("config", CONFIGS)
def test_the_layer_is_the_sum_over_a_tokens_experts(config, monkeypatch):
    """Output, routing and every gradient, that of the tokens too, are those of a plain loop over tokens.

    The grouped product leaves rows past the last expert as they are in memory, forward and backward: no numbers here.
    """
    grouped_mm = functional.grouped_mm

    def with_poison(rows, weights, *, offs):
        is_computed = (torch.arange(len(rows)) < offs[-1])[:, None]
        rows.register_hook(lambda gradient: torch.where(is_computed, gradient, torch.nan))
        return torch.where(is_computed, grouped_mm(rows, weights, offs=offs), torch.nan)

    monkeypatch.setattr(functional, "grouped_mm", with_poison)
    layer = make_layer(config)
    tokens = torch.randn(3, 12, 16, requires_grad=True)
    gradients = []
    for compute in (layer, lambda tokens: one_token_at_a_time(layer, tokens)):
        out, routing = compute(tokens)
        layer.zero_grad()
        tokens.grad = None
        (out.square().mean() + routing.balance).backward()
        found = (p.grad.clone() for p in layer.parameters())
        gradients.append((out.detach(), *(part.detach() for part in routing), tokens.grad.clone(), *found))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_sample_does_not_depend_on_its_neighbours(config):
    """Alone, a sequence gets the output that it gets beside others: the loss stays a mean over samples."""
    layer = make_layer(config)
    tokens = torch.randn(4, 12, 16)
    together, _ = layer(tokens)
    for sample in range(4):
        torch.testing.assert_close(layer(tokens[sample : sample + 1])[0][0], together[sample], rtol=1e-5, atol=1e-6)


def test_capacity_drops_the_later_tokens():
    """Where one expert is wanted by all, it takes the first ⌈factor × tokens / experts⌉ and the rest get nothing."""
    layer = make_layer(ExpertsConfig(num_experts=4, top_k=1, capacity_factor=1.0))
    same = torch.randn(16).expand(1, 12, 16)
    out, _ = layer(same)
    assert (out[0, :3].abs().sum(-1) > 0).all()
    assert (out[0, 3:] == 0).all()


def test_a_router_that_prefers_one_expert_has_a_larger_balance_loss():
    """Equal shares cost 1; all tokens at one of four experts cost up to 4."""
    layer = make_layer(ExpertsConfig(num_experts=4, top_k=1))
    layer.router.weight.data.zero_()
    assert layer(torch.randn(2, 12, 16))[1].balance.item() == pytest.approx(1.0)
    layer.router.weight.data[2] = 10.0
    assert layer(torch.rand(2, 12, 16))[1].balance.item() == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("wrong", [{"num_experts": 1}, {"num_experts": 4, "top_k": 3}])
def test_routing_that_cannot_be_is_refused(wrong):
    """One sentence with both numbers."""
    with pytest.raises(ConfigError, match="at least 2 experts"):
        ExpertsConfig(**wrong)
