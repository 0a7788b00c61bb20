"""Adapting a model: weights from a file, frozen parts, low-rank adapters; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dptrain.errors import ConfigError
from dptrain.models.adaptation import adapt_model
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.models.settings import ModelConfig


def make_model(seed=0, **shape):
    torch.manual_seed(seed)
    return Gpt(GptConfig(width=32, **shape))


def write(path, model, *, without=()):
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items() if name not in without}, path)
    return str(path)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_file(tmp_path, tied):
    """Every tensor, also where a tied one stands under one of its names only."""
    other = make_model(1, tied=tied)
    path = write(tmp_path / "w.safetensors", other, without=("embedding.weight",) if tied else ())
    model = make_model(0, tied=tied)
    adapt_model(model, ModelConfig(weights=path))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """A missing name, an unknown one, another shape, no file: each in one sentence."""
    path = write(tmp_path / "w.safetensors", make_model(depth=1))
    with pytest.raises(ConfigError, match=r"lacks blocks\.1\.attention_norm\.weight"):
        adapt_model(make_model(depth=2), ModelConfig(weights=path))
    with pytest.raises(ConfigError, match=r"and the model has not, blocks\.1"):
        adapt_model(make_model(depth=1), ModelConfig(weights=write(tmp_path / "x.safetensors", make_model(depth=2))))
    with pytest.raises(ConfigError, match=r"another shape embedding\.weight"):
        adapt_model(make_model(depth=1, vocab_size=100), ModelConfig(weights=path))
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        adapt_model(make_model(), ModelConfig(weights=str(tmp_path / "none")))


def test_frozen_parts_need_no_gradient():
    """Patterns of names; one that matches nothing is a mistake."""
    model = make_model()
    adapt_model(model, ModelConfig(freeze="embedding.*, blocks.0.*"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(name.startswith(("embedding", "blocks.0")) for name in trained)
    with pytest.raises(ConfigError, match=r"no parameter is named 'head\.\*'"):
        adapt_model(model, ModelConfig(freeze="head.*"))


def test_adapters_alone_are_trained_and_begin_as_nothing():
    """The output is that of the model without adapters, and only low-rank matrices of that rank need gradients."""
    model = make_model()
    tokens = torch.randint(0, 256, (2, 8))
    before = model(tokens)
    adapt_model(model, ModelConfig(lora_rank=4, lora_targets="attention_in,mlp_out"))
    torch.testing.assert_close(model(tokens), before)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2  # blocks, targets, A and B
    assert all("lora_" in name and 4 in parameter.shape for name, parameter in trained.items())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_rank": 4}, "needs model.lora_targets"),
        ({"lora_targets": "output"}, "without model.lora_rank"),
        ({"lora_rank": 4, "lora_targets": "nothing"}, "no adapters can be added to nothing"),
    ],
)
def test_adapters_that_cannot_be_are_refused(settings, sentence):
    """Half of the settings, or a module that is not there."""
    with pytest.raises(ConfigError, match=sentence):
        adapt_model(make_model(), ModelConfig(**settings))
