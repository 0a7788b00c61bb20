"""Masks: which weights have one, how dense layers are, where a mask moves to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptrain.errors import ConfigError
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.models.settings import SparsityConfig
from dptrain.models.sparsity import densities, drop_fraction, moved_mask, random_masks, sparse_parameters


def cnn():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 64, 3), nn.Flatten(), nn.Linear(64, 10))


@pytest.mark.parametrize("distribution", ["erk", "uniform"])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_the_whole_has_the_density_that_is_asked_for(distribution, sparsity):
    """Over all layers, none above 1; small layers are denser with the kernel, and all alike without."""
    parameters = sparse_parameters(cnn(), SparsityConfig())
    found = densities(parameters, SparsityConfig(sparsity=sparsity, distribution=distribution))
    trained = sum(density * parameters[name].numel() for name, density in found.items())
    assert trained == pytest.approx((1 - sparsity) * sum(p.numel() for p in parameters.values()))
    assert all(0 < density <= 1 for density in found.values())
    assert found["0.weight"] > found["1.weight"] or distribution == "uniform"
    assert len(set(found.values())) == 1 or distribution == "erk"


def test_the_kernel_is_that_of_the_paper():
    """Where no layer is full, densities are in proportion to (in + out + kernel) / (in × out × kernel)."""
    found = densities({"a": torch.empty(40, 20, 3, 3), "b": torch.empty(10, 40)}, SparsityConfig(sparsity=0.95))
    assert found["a"] / found["b"] == pytest.approx(((40 + 20 + 3 + 3) / (40 * 20 * 9)) / ((10 + 40) / (10 * 40)))


def test_embeddings_vectors_and_frozen_layers_stay_dense():
    """Of a GPT the linear layers alone have masks; a tied output has none, nor has what is named."""
    names = set(sparse_parameters(Gpt(GptConfig(width=32, depth=1)), SparsityConfig()))
    assert names == {f"blocks.0.{part}.weight" for part in ("attention_in", "attention_out", "mlp_in", "mlp_out")} | {
        "output.weight"
    }
    tied = Gpt(GptConfig(width=32, depth=1, tied=True))
    tied.blocks[0].mlp_in.requires_grad_(False)
    found = set(sparse_parameters(tied, SparsityConfig(dense="*.attention_*")))
    assert found == {"blocks.0.mlp_out.weight"}
    with pytest.raises(ConfigError, match=r"no sparse weight is named 'head\.\*'"):
        sparse_parameters(tied, SparsityConfig(dense="head.*"))
    with pytest.raises(ConfigError, match="the model has none"):
        sparse_parameters(nn.Embedding(3, 4), SparsityConfig())


def test_a_seed_gives_the_same_mask_everywhere():
    """Masks depend on seed and name alone, have the number asked for, and never touch torch's own generator."""
    parameters = sparse_parameters(cnn(), SparsityConfig())
    before = torch.random.get_rng_state()
    one, same, other = (random_masks(parameters, SparsityConfig(), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    for name, density in densities(parameters, SparsityConfig()).items():
        assert int(one[name].sum()) == max(1, round(density * parameters[name].numel()))


def test_the_smallest_are_dropped_and_the_steepest_grow():
    """By hand: of four weights two go, and of the others those of the largest gradient come, whatever their sign."""
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
    weight = torch.tensor([3.0, -0.1, 0.2, -4.0, 0, 0, 0])
    gradient = torch.tensor([9.0, 0.5, 0.1, 9.0, -0.7, 0.6, 0.3])
    found = moved_mask(mask, weight=weight, gradient=gradient, fraction=0.5)
    assert found.tolist() == [True, False, False, True, True, True, False]
    # A weight that was dropped may come back.
    gradient[1] = 5.0
    found = moved_mask(mask, weight=weight, gradient=gradient, fraction=0.5)
    assert found.tolist() == [True, True, False, True, True, False, False]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_number_of_weights_never_changes(fraction):
    """Whatever the part that moves, also where all weights are equal, and where hardly any place is free."""
    torch.manual_seed(0)
    for mask in (torch.rand(6, 7) < 0.2, torch.rand(6, 7) < 0.95):
        for weight, gradient in ((torch.randn(6, 7) * mask, torch.randn(6, 7)), (mask * 1.0, torch.zeros(6, 7))):
            found = moved_mask(mask, weight=weight, gradient=gradient, fraction=fraction)
            assert int(found.sum()) == int(mask.sum())
            assert fraction > 0 or torch.equal(found, mask)


def test_the_part_that_moves_falls_to_zero():
    """By a cosine from drop_fraction to zero at end_fraction of the run."""
    config = SparsityConfig(drop_fraction=0.4, end_fraction=0.5)
    assert [drop_fraction(config, progress=x) for x in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0.4, 0.2, 0, 0])
