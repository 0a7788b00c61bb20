"""Float8 layers of torchao, emulated on the CPU: which layers, what of the model stays, and gradients of samples."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dptrain.errors import ConfigError
from dptrain.models.experts import ExpertsConfig
from dptrain.models.float8 import use_float8
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.models.settings import ModelConfig, SparsityConfig
from dptrain.train import ExecutionConfig, TrainConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def torchao():
    """The package from its folder beside the environment, found in this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(sys.prefix) / "fp8"))
        yield pytest.importorskip("torchao.float8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        del sys.modules[name]


def small_gpt(**settings):
    torch.manual_seed(0)
    model = Gpt(GptConfig(vocab_size=48, context=8, width=32, depth=2, heads=2, **settings))
    for parameter in model.parameters():  # some begin as zeros
        nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model, tokens):
    """Without autocast: torchao asks for that of a GPU only."""
    model.zero_grad()
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_layers_are_replaced_and_parameters_stay(torchao):
    """All linear layers but outputs and routers; names, objects and values of parameters are those of before."""
    model = small_gpt(experts=ExpertsConfig(num_experts=16, top_k=1), local_blocks=2)
    before = dict(model.named_parameters())
    chosen = use_float8(model, device=CPU, emulate=True)
    assert {name.rpartition(".")[2] for name in chosen} == {"attention_in", "attention_out"}
    replaced = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert sorted(replaced) == chosen
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)


def test_a_gradient_is_the_mean_of_its_samples(torchao):
    """To rounding of float32, so no sample's scale is another's; and it is that of products in float8."""
    plain = small_gpt()
    model = copy.deepcopy(plain)
    chosen = use_float8(model, device=CPU, emulate=True)
    tokens = torch.randint(48, (8, 9), generator=torch.Generator().manual_seed(1))
    whole, exact = gradients(model, tokens), gradients(plain, tokens)
    one_by_one = [gradients(model, sample) for sample in tokens.split(1)]
    for name, gradient in whole.items():
        mean = torch.stack([found[name] for found in one_by_one]).mean(0)
        assert (gradient - mean).norm() < 1e-5 * gradient.norm()
    for name in chosen:
        error = (whole[f"{name}.weight"] - exact[f"{name}.weight"]).norm() / exact[f"{name}.weight"].norm()
        assert 0.005 < error < 0.2


def test_it_is_refused_where_there_is_no_such_product():
    """On a CPU, with what to do instead; the model is as it was."""
    model = small_gpt()
    with pytest.raises(ConfigError, match=r"capability 9.0 \(H100\) or newer, and this is cpu: use precision=bf16"):
        use_float8(model, device=CPU)
    assert not any("Float8" in type(module).__name__ for module in model.modules())


def test_a_model_without_such_layers_is_refused(torchao):
    """Sizes that are no multiples of 16 would leave everything in bfloat16, in silence."""
    with pytest.raises(ConfigError, match="nothing to do"):
        use_float8(nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 16)), device=CPU, emulate=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"execution": ExecutionConfig(wrapper="fsdp")},
        {"model": ModelConfig(lora_rank=2)},
        {"sparsity": SparsityConfig(method="static")},
    ],
)
def test_what_was_never_tried_with_it_is_refused(settings):
    """Sharded weights, adapters and masks, in one sentence."""
    with pytest.raises(ConfigError, match="precision=fp8 does not go with it"):
        TrainConfig(precision="fp8", **settings)
