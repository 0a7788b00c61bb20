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


def test_a_local_block_has_the_gradient_of_its_own_loss():
    """Each loss reaches the parameters of its block alone, as `local_blocks` names them, and each parameter has one.

    The gradient of the sum is for each block that of its loss; in eval mode the last head alone predicts.
    """
    torch.manual_seed(0)
    model = Gpt(GptConfig(width=32, context=16, depth=5, local_blocks=3))
    for parameter in model.parameters():  # blocks begin as the identity
        parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = torch.randint(0, 256, (4, 17))
    blocks = model.local_blocks()
    assert {id(p) for own in blocks.values() for p in own} == {id(p) for p in model.parameters()}
    assert [sum(p is q for own in blocks.values() for q in own) for p in model.parameters()] == [1] * len(
        list(model.parameters())
    )

    def losses():
        found = model(tokens[:, :-1])
        all_logits = (*found.local_logits, found.logits)
        return [functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) for logits in all_logits]

    alone = {}
    for name, own_loss in zip(blocks, losses(), strict=True):
        model.zero_grad(set_to_none=True)
        own_loss.backward()
        reached = {id(p) for p in model.parameters() if p.grad is not None}
        assert reached == {id(p) for p in blocks[name]}
        alone |= {id(p): p.grad.clone() for p in blocks[name]}
    model.zero_grad(set_to_none=True)
    sum(losses()).backward()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, alone[id(parameter)], rtol=1e-5, atol=1e-7)

    expected = model(tokens[:, :-1]).logits
    for parameter in model.local_heads.parameters():
        parameter.data.zero_()
    predicted = model.eval()(tokens[:, :-1])
    assert isinstance(predicted, torch.Tensor)
    torch.testing.assert_close(predicted, expected)


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
        ({"depth": 3, "local_blocks": 4}, "local_blocks must be at most depth = 3, got 4"),
        ({"local_blocks": 2, "tied": True}, "trained by the first loss and the output by the last"),
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
