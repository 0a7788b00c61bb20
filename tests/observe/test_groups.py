"""Noise scales of parts of a model, and in Adam's geometry, against plain gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise import PresentState, SquaredNorms, noise_scale, present_moments, present_updated, unbiased_moments
from dptrain.noise.derived import expert_noise_scale
from dptrain.observe.geometry import AdamGeometry
from dptrain.observe.groups import REST, resolve_groups
from tests.observe.plain import (
    ACCUMULATION,
    MICRO,
    STEPS,
    gradient,
    make_model,
    micro_batch,
    pair,
    reference,
    sq_norm,
    train,
    trained,
)
from tests.replicas import run_replicas

PARTS = {"blocks": slice(2, 6), "head": slice(7, 8)}
"""Where the parameters of two groups stand among the trained ones."""


def grouped(rank, world_size):
    """Return the pairs by group with three hooks, with the whole."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for name in ("parameters", "hook", "fully_shard"):
        model = make_model()
        if name == "fully_shard":
            fully_shard(model.blocks[0])
            fully_shard(model)
            no_sync, method = None, "auto"
        else:
            model, method = DistributedDataParallel(model), name
            no_sync = model.no_sync
        meter = dptrain.attach(model, every=1, method=method, groups={"blocks": "blocks", "head": "head"})
        train(model, rank, meter=meter, **({} if no_sync is None else {"no_sync": no_sync}))
        found[name] = {group: pair(scale) for group, scale in meter.read_groups().items()}, pair(meter.read_window())
    restored = dptrain.attach(make_and_wrap(), groups={"blocks": "blocks", "head": "head"})
    restored.load_state_dict(meter.state_dict())
    assert restored.read_groups() == meter.read_groups()
    keys = set(restored.step().as_metrics())
    return found, keys


def make_and_wrap():
    return DistributedDataParallel(make_model())


def test_groups_are_right_and_add_up_with_each_hook():
    """Each group's pair is that of its plain gradients, and the pairs add up to the whole."""
    (found, keys), other = run_replicas(grouped, world_size=2)
    assert (found, keys) == other
    for method, (groups, whole) in found.items():
        assert set(groups) == {"blocks", "head", REST}
        for name, part in PARTS.items():
            expected = reference(2, part=part, accumulated=method == "hook")
            assert groups[name] == pytest.approx(expected, rel=1e-4), (method, name)
        for i in range(2):
            assert sum(group[i] for group in groups.values()) == pytest.approx(whole[i], rel=1e-9)
    assert {"noise_scale/trace", "noise_scale/head/trace", "noise_scale/rest/grad_sq"} <= keys


def test_groups_can_be_named_in_three_ways():
    """Prefixes, first-level children and an optimizer's groups; a tied weight belongs to the first child."""
    model = make_model()
    assert resolve_groups("module", model=model).names == ("first", "blocks", "last", "head")
    optimizer = torch.optim.SGD(
        [{"params": model.head.parameters(), "name": "head"}, {"params": model.first.parameters()}], 1
    )
    assert resolve_groups(optimizer, model=model).names == ("head", "group_1", REST)
    labels = resolve_groups({"one": "blocks.0"}, model=model)
    assert [labels.names[i] for i in labels.labels] == [REST, REST, "one", "one", REST, REST, REST, REST]


def test_wrong_groups_are_refused():
    """Overlapping, empty and unknown groups are reported with what to do."""
    model = make_model()
    for groups, text in (
        ({"a": "head", "b": model.head.parameters()}, "must not overlap"),
        ({"a": "nothing"}, "no trained parameter"),
        ("children", "must be a mapping"),
    ):
        with pytest.raises(ObservationError, match=text):
            dptrain.attach(model, groups=groups)
    meter = dptrain.attach(model, groups={"head": "head"})
    with pytest.raises(ObservationError, match="same `groups`"):
        dptrain.attach(make_model()).load_state_dict(meter.state_dict())


def adam(model, amsgrad):
    return torch.optim.AdamW(trained(model), lr=0.01, amsgrad=amsgrad)


def preconditioned(rank, world_size, amsgrad):
    """Return the pair in Adam's geometry under DDP and replicate(), with what was dropped and its metrics' names."""
    from torch.distributed._composable.replicate_with_fsdp import replicate

    found = []
    for wrap in (DistributedDataParallel, replicate):
        model = wrap(make_model())
        bare = train(model, rank, optimizer=adam(model, amsgrad))
        model = wrap(make_model())
        optimizer = adam(model, amsgrad)
        meter = dptrain.attach(model, every=1, geometry="adam", groups="module", optimizer=optimizer)
        assert all(map(torch.equal, bare, train(model, rank, meter=meter, optimizer=optimizer)))
        reading = meter.step()
        found.append((pair(reading.noise_scale), meter.steps_dropped, reading.geometry, list(reading.as_metrics())))
    return found


def adam_reference(world_size, amsgrad):
    """Precondition plain gradients by the state before each step; the first step has none."""
    model, sums = make_model(), PresentState()
    optimizer = adam(model, amsgrad)
    for step in range(STEPS):
        gradients = [
            gradient(model, micro_batch(step, micro_step, rank))
            for rank in range(world_size)
            for micro_step in range(ACCUMULATION)
        ]
        mean = [sum(parts) / len(gradients) for parts in zip(*gradients, strict=True)]
        if step > 0:
            scales = []
            for p in trained(model):
                state = optimizer.state[p]
                second = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"].double()
                scales.append(1 / ((second / (1 - 0.999**step)).sqrt() + 1e-8))
            norms = SquaredNorms.of(
                [sq_norm([g * s for g, s in zip(parts, scales, strict=True)]) for parts in gradients],
                sizes=[MICRO] * len(gradients),
                large_sq_norm=sq_norm([g * s for g, s in zip(mean, scales, strict=True)]),
            )
            sums = present_updated(sums, unbiased_moments(norms))
        for p, g in zip(trained(model), mean, strict=True):
            p.grad = g.float()
        optimizer.step()
    return pair(noise_scale(present_moments(sums)))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adams_geometry_is_that_of_its_state_before_the_step(amsgrad):
    """The pair is that of preconditioned plain gradients; before Adam has a state nothing is said, and it is named."""
    results = run_replicas(preconditioned, world_size=2, args=(amsgrad,))
    assert results[0] == results[1]
    for found, dropped, geometry, names in results[0]:
        assert found == pytest.approx(adam_reference(2, amsgrad), rel=2e-3)
        # The first step alone: the call after the optimizer's step only returns the reading.
        assert dropped == 1
        assert geometry == "adam"
        assert all(name.startswith("noise_scale/adam/") for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adams_norm_has_at_least_single_precision(dtype):
    """With parameters, gradients and Adam's state in any precision, before it has a state and after."""
    model = make_model().to(dtype)
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    geometry = AdamGeometry(trained(model), optimizer=optimizer)
    grad = torch.ones_like(trained(model)[0])
    out = None
    for _ in range(2):
        geometry.open()
        out = geometry.norm(0, grad, out=out)
        assert out.dtype == torch.promote_types(dtype, torch.float32)
        for p in trained(model):
            p.grad = torch.ones_like(p)
        optimizer.step()
    # The bias-corrected second moment of ones is 1.
    assert float(out) == pytest.approx(grad.numel() ** 0.5, rel=0.02)


def test_adams_geometry_needs_adam():
    """Another optimizer, or one that trains only a part, is refused."""
    model = make_model()
    with pytest.raises(ObservationError, match="SGD"):
        dptrain.attach(model, geometry="adam", optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(ObservationError, match=r"has no parameter of the model|all trained parameters"):
        dptrain.attach(model, geometry="adam", optimizer=torch.optim.Adam(nn.Linear(2, 2).parameters()))


class Routed(nn.Module):
    """Sends each sample to one of four experts at random."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 2, bias=False) for _ in range(4)])

    def forward(self, x, to):
        x = self.stem(x)
        return torch.stack([self.experts[k](row) for k, row in zip(to.tolist(), x, strict=True)])


def test_experts_are_groups_whose_noise_scale_counts_routed_samples():
    """Routed at random with p = 1/4, the noise scale of an expert is (B_h + 1 − p)/p within its interval."""
    torch.manual_seed(5)
    model, probability = Routed(), 0.25
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(64, 8, generator=generator) + 0.7
    with dptrain.attach(model, every=1, groups="experts") as meter:
        for _ in range(300):
            for _ in range(2):
                chosen = torch.randint(0, 64, (16,), generator=generator)
                to = torch.randint(0, 4, (16,), generator=generator)
                ((model(data[chosen], to) - 1).square().sum(1).mean() / 2).backward()
            meter.step()
            model.zero_grad()
    found = meter.read_groups()
    assert set(found) == {"experts.0", "experts.1", "experts.2", "experts.3", "rest"}
    assert sum(scale.grad_sq_norm for scale in found.values()) == pytest.approx(meter.read_window().grad_sq_norm)
    for k in range(4):
        rows = torch.stack(
            [
                torch.autograd.grad((model.experts[k](model.stem(x)) - 1).square().sum(), model.experts[k].weight)[0]
                for x in data
            ]
        ).flatten(1)
        routed = float(rows.var(0, unbiased=False).sum() / rows.mean(0).square().sum())
        expected = expert_noise_scale(routed, probability=probability)
        scale = found[f"experts.{k}"]
        lower, upper = scale.bounds(3.5)
        assert lower < expected < upper
        assert scale.value == pytest.approx(expected, rel=0.2)
    with pytest.raises(ObservationError, match="called 'experts'"):
        dptrain.attach(make_model(), groups="experts")


def make_experts():
    from dptrain.models.experts import ExpertsConfig
    from dptrain.models.gpt import Gpt, GptConfig

    torch.manual_seed(0)
    experts = ExpertsConfig(num_experts=4, top_k=1)
    model = Gpt(GptConfig(vocab_size=16, context=8, depth=2, heads=2, width=16, experts=experts))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def train_experts(model, meter, rank):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        tokens = torch.randint(0, 16, (3, 8), generator=generator)
        logits, routing, _ = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        (loss + 0.01 * routing.balance).backward()
        meter.step()
        model.zero_grad()
    return {name: pair(scale) for name, scale in meter.read_groups().items()}


def experts_on_replicas(rank, world_size):
    """Return the pairs of stacked experts, and of their layers as groups that are named, with each hook."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for method in ("parameters", "hook"):
        for kind in ("experts", "named"):
            model = DistributedDataParallel(make_experts())
            layers = {
                f"layer {i}": [block.experts.weight_in, block.experts.weight_out]
                for i, block in enumerate(model.module.blocks)
            }
            groups = "experts" if kind == "experts" else layers
            meter = dptrain.attach(model, every=1, method=method, groups=groups)
            found[method, kind] = train_experts(model, meter, rank)
    model = make_experts()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    with dptrain.attach(model, every=1, groups="experts") as meter:
        found["sharded"] = train_experts(model, meter, rank)
    return found


def test_the_stacked_experts_of_a_gpt_are_groups_that_add_up_to_their_layer():
    """Each expert by its rows, the router apart from them; one group for each layer where rows are sharded."""
    found, other = run_replicas(experts_on_replicas, world_size=2)
    assert found == other
    names = {f"blocks.{layer}.experts.{expert}" for layer in range(2) for expert in range(4)}
    for method in ("parameters", "hook"):
        experts, layers = found[method, "experts"], found[method, "named"]
        assert set(experts) == {*names, REST}
        assert len({experts[name] for name in names}) == len(names)
        for layer in range(2):
            for i in range(2):
                total = sum(experts[f"blocks.{layer}.experts.{expert}"][i] for expert in range(4))
                assert total == pytest.approx(layers[f"layer {layer}"][i], rel=1e-5)
        assert experts[REST] == pytest.approx(layers[REST])
    assert set(found["sharded"]) == {"blocks.0.experts", "blocks.1.experts", REST}
    for layer in range(2):
        expected = found["parameters", "named"][f"layer {layer}"]
        assert found["sharded"][f"blocks.{layer}.experts"] == pytest.approx(expected, rel=1e-4)
