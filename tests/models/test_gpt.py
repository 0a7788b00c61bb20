"""The GPT family: its sizes, causality, and each of its variants learns."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from dptrain.errors import ConfigError
from dptrain.models.experts import ExpertsConfig
from dptrain.models.gpt import SIZES, Gpt, GptConfig

VARIANTS = [
    GptConfig(width=32, context=16),
    GptConfig(width=32, context=16, positions="learned", feed_forward="relu2"),
    GptConfig(width=32, context=16, feed_forward="swiglu", tied=True),
    GptConfig(width=32, context=16, experts=ExpertsConfig(num_experts=4)),
]


def logits_of(model, tokens):
    found = model(tokens)
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(("size", "millions"), [("124m", 124), ("350m", 354), ("1.5b", 1555)])
def test_a_size_has_the_parameters_of_its_name(size, millions):
    """The name of a size is its number of parameters."""
    with torch.device("meta"):
        model = Gpt(SIZES[size])
    assert round(model.num_parameters() / 1e6) == millions


@pytest.mark.parametrize("config", VARIANTS)
def test_a_prediction_does_not_look_ahead(config):
    """Changing a token changes no prediction before it, and does change its own."""
    torch.manual_seed(0)
    model = Gpt(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tokens = torch.randint(0, 256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = logits_of(model, tokens), logits_of(model, changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=1e-5, atol=1e-6)
    assert (before[:, 9] != after[:, 9]).any()


@pytest.mark.parametrize("config", VARIANTS)
def test_an_untrained_model_guesses_uniformly_and_learns(config):
    """The first loss is ln 256 within 2 %, and 40 steps on one micro-batch take a third off it."""
    torch.manual_seed(0)
    model = Gpt(config)
    tokens = torch.randint(0, 256, (8, 17), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        found = model(tokens[:, :-1])
        logits, balance = (found[0], found[1].balance) if isinstance(found, tuple) else (found, 0.0)
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(5.545, rel=0.02)
    assert losses[-1] < losses[0] * 2 / 3


def test_tied_weights_are_one_parameter():
    """With tied=True the embedding is the output's matrix, and counts once."""
    tied, untied = (Gpt(GptConfig(tied=tied)) for tied in (True, False))
    assert tied.embedding.weight is tied.output.weight
    assert untied.num_parameters() - tied.num_parameters() == 256 * 128


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"width": 130, "heads": 4}, "multiple of 2 × heads = 8"),
        ({"width": 130, "heads": 4, "positions": "learned"}, "multiple of heads = 4"),
        ({"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ({"feed_forward": "silu"}, "feed_forward must be one of gelu, relu2, swiglu, got 'silu'"),
    ],
)
def test_shapes_that_no_model_has_are_refused(shape, sentence):
    """One sentence with the value and the rule."""
    with pytest.raises(ConfigError, match=sentence):
        GptConfig(**shape)


def test_more_tokens_than_learned_positions_are_refused():
    """A table of 16 positions has no 17th row to read."""
    with pytest.raises(ValueError, match="17 tokens are more than the 16 learned positions"):
        Gpt(VARIANTS[1])(torch.zeros(1, 17, dtype=torch.int64))
