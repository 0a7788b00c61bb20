"""Weights in int8 and back: how far off they are, which they are, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptrain.errors import ConfigError
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.models.int8 import as_int8, from_int8, int8_weights


def test_a_weight_is_off_by_half_a_step_of_its_channel():
    """The product of int8 and scale is the weight within half a scale; a channel of zeros stays one."""
    torch.manual_seed(0)
    weight = torch.randn(5, 4, 3) * torch.tensor([1.0, 100.0, 1e-3, 0.0, 7.0]).view(-1, 1, 1)
    found = as_int8({"a.weight": weight, "a.bias": torch.ones(5)}, ["a.weight"])
    assert found["a.weight"].dtype == torch.int8
    assert found["a.weight"].abs().amax((1, 2)).tolist() == [127, 127, 127, 0, 127]
    back = from_int8(found)
    assert back.keys() == {"a.weight", "a.bias"}
    assert bool(((back["a.weight"] - weight).abs() <= 0.5001 * found["a.weight_scale"].view(-1, 1, 1)).all())
    assert not torch.equal(back["a.weight"], weight)


def test_which_weights_become_int8():
    """Those of linear and convolutional layers, a tied one under its first name; not embeddings nor norms."""
    model = nn.ModuleList([nn.Conv2d(2, 3, 3), nn.ConvTranspose1d(2, 3, 3), nn.Embedding(3, 4), nn.LayerNorm(3)])
    assert int8_weights(model) == ["0.weight"]
    tied = int8_weights(Gpt(GptConfig(width=16, depth=1, context=8, tied=True)))
    assert tied[0] == "embedding.weight"
    assert "output.weight" not in tied
    assert len(tied) == 5


def test_what_is_no_int8_is_left_alone():
    """Integers without scales, and scales of no integers, are read as they are."""
    tensors = {"x": torch.ones(2, dtype=torch.int8), "y": torch.ones(2), "y_scale": torch.ones(2)}
    assert all(found is tensors[name] for name, found in from_int8(tensors).items())


def test_numbers_that_int8_has_not_are_refused():
    """No weight becomes another number without a word."""
    with pytest.raises(ConfigError, match="w holds numbers that are not finite"):
        as_int8({"w": torch.tensor([[float("nan"), 1.0]])}, ["w"])
    with pytest.raises(ConfigError, match="w_scale of its own"):
        as_int8({"w": torch.ones(1, 1), "w_scale": torch.ones(1)}, ["w"])
