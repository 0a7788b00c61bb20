"""The optimizer: any by name as by hand, what decays, and that a step which is not finite leaves it as it was."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch
from torch import nn

from dptrain.checkpoint.state import pack_optimizer, unpack_optimizer
from dptrain.config.scaling_rules import BetaScaling
from dptrain.control.batch_scaling import adam_betas
from dptrain.errors import ConfigError, TaskError
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.train import OptimizerConfig
from dptrain.train.optimizer import build_optimizer, set_rate, skips_on_device, step_if_finite

CONFIGS = [
    OptimizerConfig(name="adamw", learning_rate=0.1),
    OptimizerConfig(name="sgd", learning_rate=0.1),
    OptimizerConfig(name="sgd", learning_rate=0.1, beta1=0.0),
]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))


def give_gradients(model, *, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    if value is not None:
        parameter.grad.view(-1)[0] = value


def take_step(optimizer, model, *, seed, value=None):
    give_gradients(model, seed=seed, value=value)
    step_if_finite(optimizer, nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def everything(optimizer, model):
    return copy.deepcopy(([p.detach() for p in model.parameters()], optimizer.state_dict()["state"]))


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_matrices_decay_and_vectors_do_not():
    """Every trainable parameter is in exactly one group; biases and norms are in the one without decay."""
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.3), model)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [p.shape for p in decayed["params"]] == [(2, 4)]
    assert {id(p) for p in plain["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}


def test_a_model_without_vectors_has_one_group():
    """An empty group would be an error of torch's at the first step."""
    assert len(build_optimizer(OptimizerConfig(learning_rate=0.1), nn.Linear(2, 2, bias=False)).param_groups) == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_finite_step_is_that_of_torch(config):
    """Bit for bit the step of the same optimizer without anything that could skip."""
    models = [make_model(), make_model()]
    ours, plain = (build_optimizer(config, model) for model in models)
    for state in plain.state.values():
        state.clear()
    for seed in range(3):
        take_step(ours, models[0], seed=seed)
        give_gradients(models[1], seed=seed)
        plain.step()
    assert_equal(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", [0, 2])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_that_is_not_finite_never_happened(config, broken, value):
    """Parameters, moments and step counters end as without it, also where it is the very first."""
    models = [make_model(), make_model()]
    optimizers = [build_optimizer(config, model) for model in models]
    assert all(map(skips_on_device, optimizers))
    for seed in range(4):
        take_step(optimizers[0], models[0], seed=seed, value=value if seed == broken else None)
        if seed != broken:
            take_step(optimizers[1], models[1], seed=seed)
    assert_equal(everything(optimizers[0], models[0]), everything(optimizers[1], models[1]))


def test_an_optimizer_that_cannot_skip_by_itself_is_not_stepped():
    """Without the fused kernels the host looks, and the result is the same."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not skips_on_device(optimizer)
    take_step(optimizer, model, seed=0)
    before = everything(optimizer, model)
    take_step(optimizer, model, seed=1, value=math.nan)
    assert_equal(everything(optimizer, model), before)


def test_the_rate_is_set_for_all_groups():
    """A rate of 0 changes nothing, so it has reached every group."""
    model = make_model()
    optimizer = build_optimizer(CONFIGS[0], model)
    before = [p.detach().clone() for p in model.parameters()]
    set_rate(optimizer, 0.0)
    take_step(optimizer, model, seed=0)
    assert_equal([p.detach() for p in model.parameters()], before)


def own_groups(model):
    """A function that returns groups with a decay and betas of their own beside those of the run."""
    return [
        {"params": model[0].parameters(), "weight_decay": 0.01, "betas": (0.8, 0.98)},
        {"params": model[1].parameters(), "weight_decay": 0.0},
        {"params": model[2].parameters()},
    ]


def own_optimizer(model):
    """A function that returns the same groups in an optimizer."""
    return torch.optim.AdamW(own_groups(model), lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))


@pytest.mark.parametrize(
    "built",
    [
        lambda model, rules: build_optimizer(OptimizerConfig(**rules), model, parameter_groups=own_groups),
        lambda model, rules: build_optimizer(OptimizerConfig(name=f"{__file__}:own_groups", **rules), model),
        lambda model, rules: build_optimizer(OptimizerConfig(name=f"{__file__}:own_optimizer", **rules), model),
    ],
    ids=["task", "groups", "optimizer"],
)
def test_decay_and_betas_of_a_group_follow_the_batch_from_their_own_values(built):
    """At the reference batch each group has what it was given; at twice the batch each has moved from there."""
    rules = {"learning_rate": 0.1, "weight_decay": 0.1, "decay_rule": "timescale", "beta_rule": "half_life"}
    optimizer = built(make_model(), rules)
    given = [(0.01, (0.8, 0.98)), (0.0, (0.9, 0.95)), (0.1, (0.9, 0.95))]
    for batch, factor in ((16, 1.0), (32, 1.5), (16, 1.0)):
        scaling = BetaScaling(rule="half_life", batch=batch, reference_batch=16)
        set_rate(optimizer, 0.1, betas=scaling, decay_factor=factor)
        for group, (decay, betas) in zip(optimizer.param_groups, given, strict=True):
            assert group["weight_decay"] == pytest.approx(decay * factor)
            expected = adam_betas("half_life", betas, batch=batch, reference_batch=16)
            assert group["betas"] == pytest.approx((expected.beta1, expected.beta2))


def test_decay_and_betas_among_the_options_follow_the_batch_from_there():
    """optimizer.options takes the place of the settings, and the rules begin with it."""
    config = OptimizerConfig(learning_rate=0.1, options={"weight_decay": 0.02, "betas": (0.8, 0.98)})
    optimizer = build_optimizer(config, make_model())
    set_rate(optimizer, 0.1, betas=BetaScaling(rule="half_life", batch=8, reference_batch=8), decay_factor=2.0)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.04, 0.0]
    assert all(group["betas"] == pytest.approx((0.8, 0.98)) for group in optimizer.param_groups)


def test_what_a_group_was_built_with_comes_back_from_a_checkpoint_of_an_earlier_version():
    """Such a checkpoint holds the values in force at its batch alone, and the next step begins with those built."""
    models = [make_model(), make_model()]
    optimizers = [build_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.1), model) for model in models]
    names = [{parameter: key for key, parameter in model.named_parameters()} for model in models]
    set_rate(optimizers[0], 0.1, decay_factor=3.0)
    tensors, state = pack_optimizer(optimizers[0], names=names[0])
    for group in state["groups"]:
        del group["options"]["tuned_weight_decay"], group["options"]["tuned_betas"]
    unpack_optimizer(optimizers[1], names=names[1], tensors=tensors, state=state)
    assert [group["weight_decay"] for group in optimizers[1].param_groups] == pytest.approx([0.3, 0.0])
    set_rate(optimizers[1], 0.1, decay_factor=2.0)
    assert [group["weight_decay"] for group in optimizers[1].param_groups] == pytest.approx([0.2, 0.0])


class Signed(torch.optim.Optimizer):
    """A user's own: follows the sign of the gradient."""

    def __init__(self, params, lr=1.0, *, keep=0.0):
        super().__init__(params, {"lr": lr, "keep": keep})

    @torch.no_grad()
    def step(self, closure=None):  # noqa: ARG002 - as torch has it
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.grad.sign())


def two_rates(model):
    """A function that returns groups: the first layer at a tenth of the rate, the rest as the run has it."""
    rest = [p for module in list(model)[1:] for p in module.parameters()]
    return [{"params": list(model[0].parameters()), "lr": 0.01}, {"params": rest, "weight_decay": 0.0}]


def an_optimizer(model):
    """A function that returns an optimizer."""
    return torch.optim.RMSprop(
        [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[1:].parameters()}], lr=0.1
    )


def muon_with_adamw(model):
    """Written by hand: the hidden matrix by Muon, the output layer and the vectors by AdamW."""
    hidden, last = model[0].weight, model[2].weight
    vectors = [p for p in model.parameters() if p.dim() == 1]
    options = {"lr": 0.1, "betas": (0.9, 0.95)}
    return [
        torch.optim.Muon([hidden], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": [last]}, {"params": vectors, "weight_decay": 0.0}], weight_decay=0.1, **options),
    ]


HERE = __file__


def decayed(model, kind, **options):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [
        kind([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=0.1, **options)
    ]


BY_HAND = {
    "muon": muon_with_adamw,
    "adafactor": lambda model: decayed(model, torch.optim.Adafactor),
    "NAdam": lambda model: decayed(model, torch.optim.NAdam, betas=(0.9, 0.95), decoupled_weight_decay=True),
    "torch.optim.Adamax": lambda model: decayed(model, torch.optim.Adamax, betas=(0.9, 0.95)),
    f"{HERE}:Signed": lambda model: [Signed(model.parameters(), lr=0.1)],
    f"{HERE}:two_rates": lambda model: [
        torch.optim.AdamW(
            [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1:].parameters(), "weight_decay": 0.0}],
            lr=0.1,
            weight_decay=0.1,
            betas=(0.9, 0.95),
        )
    ],
    f"{HERE}:an_optimizer": lambda model: [an_optimizer(model)],
}
"""Name → the same by hand, as one or more optimizers."""


@pytest.mark.parametrize("name", BY_HAND)
def test_any_optimizer_steps_as_by_hand_under_a_moving_rate(name):
    """Bit for bit a plain loop with that class, with the rate of each group moved in its ratio."""
    models = [make_model(), make_model()]
    ours = build_optimizer(OptimizerConfig(name=name, learning_rate=0.1), models[0])
    plain = BY_HAND[name](models[1])
    own_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in plain]
    for seed in range(4):
        factor = 1.0 / (1 + seed)
        set_rate(ours, 0.1 * factor)
        take_step(ours, models[0], seed=seed)
        give_gradients(models[1], seed=seed)
        for optimizer, rates in zip(plain, own_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate / 0.1 * (0.1 * factor) if rate != 0.1 else 0.1 * factor
            optimizer.step()
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BY_HAND)
def test_any_optimizer_goes_on_from_its_saved_state(name):
    """Packed, and unpacked into a new one, it takes the steps that it would have taken, bit for bit."""
    models = [make_model(), make_model()]
    optimizers = [build_optimizer(OptimizerConfig(name=name, learning_rate=0.1), model) for model in models]
    for seed in range(3):
        take_step(optimizers[0], models[0], seed=seed)
    names = [{parameter: key for key, parameter in model.named_parameters()} for model in models]
    tensors, state = pack_optimizer(optimizers[0], names=names[0])
    tensors = {key: value.clone() for key, value in tensors.items()}
    models[1].load_state_dict(models[0].state_dict())
    unpack_optimizer(optimizers[1], names=names[1], tensors=tensors, state=json.loads(json.dumps(state)))
    for seed in range(3, 5):
        for optimizer, model in zip(optimizers, models, strict=True):
            set_rate(optimizer, 0.05)
            take_step(optimizer, model, seed=seed)
    assert_equal(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.parametrize("name", ["muon", f"{HERE}:Signed"])
def test_an_optimizer_without_a_switch_is_skipped_by_the_host(name):
    """A gradient that is not finite changes neither parameters nor state."""
    model = make_model()
    optimizer = build_optimizer(OptimizerConfig(name=name, learning_rate=0.1), model)
    take_step(optimizer, model, seed=0)
    before = everything(optimizer, model)
    take_step(optimizer, model, seed=1, value=math.nan)
    assert_equal(everything(optimizer, model), before)


def test_muon_leaves_the_heads_of_local_blocks_to_adamw():
    """They are output layers, like the model's own."""
    model = Gpt(GptConfig(width=16, context=8, local_blocks=2))
    optimizer = build_optimizer(OptimizerConfig(name="muon", learning_rate=0.1), model)
    by_muon = {id(p) for group in optimizer.param_groups if "ns_steps" in group for p in group["params"]}
    hidden = {id(p) for p in model.blocks.parameters() if p.dim() > 1}
    assert by_muon == hidden


def test_a_tasks_groups_may_name_an_optimizer_each():
    """One group by SGD, one by the run's own class: each steps as alone."""
    models = [make_model(), make_model()]
    ours = build_optimizer(
        OptimizerConfig(name="adafactor", learning_rate=0.1),
        models[0],
        parameter_groups=lambda model: [
            {"params": model[0].parameters(), "optimizer": "sgd", "lr": 0.5, "weight_decay": 0.0},
            {"params": model[1:].parameters(), "weight_decay": 0.0},
        ],
    )
    plain = [
        torch.optim.SGD(models[1][0].parameters(), lr=0.5, momentum=0.9),
        torch.optim.Adafactor(models[1][1:].parameters(), lr=0.1),
    ]
    for seed in range(3):
        take_step(ours, models[0], seed=seed)
        give_gradients(models[1], seed=seed)
        for optimizer in plain:
            optimizer.step()
    torch.testing.assert_close(list(models[0].parameters()), list(models[1].parameters()), rtol=1e-6, atol=0)


def forgetful(model):
    """Groups that leave the last layer out."""
    return [{"params": list(model[0].parameters())}]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("adammw", {}, "no optimizer 'adammw', did you mean 'adamw'"),
        ("lbfgs", {}, "no optimizer 'lbfgs'"),
        ("adafactor", {"momentum": 0.9}, "Adafactor has no option 'momentum'; its options are lr, beta2_decay"),
        ("sgd", {"lr": 0.1}, "optimizer.options has lr, which would be ignored: give optimizer.learning_rate"),
        ("os.getcwd", {}, "os.getcwd must take the model and return dicts with 'params', or an optimizer: TypeError"),
        (f"{HERE}:make_model", {}, "return dicts with 'params', or an optimizer: TypeError"),
        ("torch.optim.LBFGS", {}, "torch.optim.LBFGS asks for the loss several times in a step: choose another"),
        ("torch.optim.SparseAdam", {}, "torch.optim.SparseAdam needs sparse gradients"),
        ("torch.nn.Linear", {}, "not one derived from torch.optim.Optimizer"),
        ("torch.optim.Nothing", {}, "module 'torch.optim' has no 'Nothing'"),
        (f"{HERE}:forgetful", {}, "leave out 1.weight, 1.bias, 2.weight: give them a group"),
        (f"{HERE}:an_optimizer", {"eps": 1.0}, "returns an optimizer, and optimizer.options would be ignored"),
        ("nadam", {"betas": (2.0, 0.9)}, "NAdam cannot be built: Invalid beta"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_refused(name, options, sentence):
    """One sentence with what there is instead."""
    with pytest.raises((ConfigError, TaskError), match=re.escape(sentence)):
        build_optimizer(OptimizerConfig(name=name, learning_rate=0.1, options=options), make_model())
