"""Sparse training: what stays zero, where masks move, what the meter sees; on several replicas and over a resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import dptrain
from dptrain.checkpoint.store import load_newest
from dptrain.errors import ConfigError
from dptrain.models.settings import ModelConfig, SparsityConfig
from dptrain.models.sparsity import moved_mask
from dptrain.tasks import Moment
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, NoiseConfig, OptimizerConfig, TrainConfig, Trainer
from dptrain.train.hooks import SparseTraining
from tests.replicas import run_replicas
from tests.runs import Killed, assert_same, attempt, result_of

RIGL = SparsityConfig(method="rigl", sparsity=0.8, update_every_samples=48)


def settings(folder, **more):
    """Settings of a short sparse run of the MLP on the digits."""
    return TrainConfig(
        **{
            "task": "digits",
            "run_dir": str(folder),
            "device": "cpu",
            "max_samples": 480,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "layout_replicas": 4,
            "control": ControlConfig(law="constant"),
            "checkpoint": CheckpointConfig(every_samples=80),
            "noise": NoiseConfig(every=1),
            "log": LogConfig(tracker="none"),
            "sparsity": RIGL,
            **more,
        }
    )


def masks_of(folder):
    return load_newest(Path(folder) / "checkpoints").tensors("hook")


def make(method="rigl", **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = SparsityConfig(method=method, sparsity=0.7, update_every_samples=10, **more)
    return model, optimizer, SparseTraining(config, model, optimizer=optimizer, max_samples=100, seed=0)


def step(model, optimizer, hook, *, number):
    """Take a step of two micro-batches of five samples; return the dense gradients of a copy without masks."""
    generator = torch.Generator().manual_seed(number)
    inputs, classes = torch.randn(10, 8, generator=generator), torch.randint(0, 3, (10,), generator=generator)
    dense = copy.deepcopy(model)
    for part in (slice(0, 5), slice(5, 10)):
        for one in (dense, model):
            (functional.cross_entropy(one(inputs[part]), classes[part]) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    hook.on_step(Moment(step=number, samples_seen=10 * number, global_batch_size=10, model=model))
    return {name: p.grad for name, p in dense.named_parameters()}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon])
def test_masked_weights_stay_at_zero(kind):
    """Under any optimizer, also one that mixes a matrix's entries; with static masks nothing ever moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 3, bias=False))
    optimizer = kind(model.parameters(), lr=0.05)
    config = SparsityConfig(method="static", sparsity=0.7)
    hook = SparseTraining(config, model, optimizer=optimizer, max_samples=100, seed=0)
    before, masks = copy.deepcopy(model.state_dict()), hook.masks
    for number in range(1, 6):
        step(model, optimizer, hook, number=number)
    for name, mask in hook.masks.items():
        weight = model.state_dict()[name]
        assert torch.equal(mask, masks[name])
        assert not weight[~mask].any()
        assert bool((weight[mask] != before[name][mask]).all())


def test_masks_move_by_the_gradient_of_all_weights():
    """The step after a boundary decides: its masks are `moved_mask` of its weights and of its dense gradient.

    Weights that come begin at zero with no memory in the optimizer, and those that stay are as they were.
    """
    model, optimizer, hook = make(drop_fraction=0.5)
    step(model, optimizer, hook, number=1)
    before = hook.masks
    pending = copy.deepcopy((model.state_dict(), hook.state_dict()))
    assert pending[1]["keeps_gradients"]
    gradients = step(model, optimizer, hook, number=2)
    fraction = 0.25 * (1 + torch.cos(torch.tensor(torch.pi * 0.1 / 0.75))).item()
    num_moved = 0
    for name, mask in hook.masks.items():
        weight = dict(model.named_parameters())[name]
        assert int(mask.sum()) == int(before[name].sum())
        new = mask & ~before[name]
        num_moved += int(new.sum())
        assert not weight[new].any()
        assert not optimizer.state[weight]["exp_avg"][new | ~mask].any()
        stayed = torch.where(mask & before[name], weight, 0)
        # Those that went count as the smallest here; that they are, the test of `moved_mask` shows.
        expected = moved_mask(
            before[name], weight=torch.where(mask, stayed, 0), gradient=gradients[name], fraction=fraction
        )
        assert torch.equal(mask, expected)
    assert num_moved > 5
    assert hook.state_dict()["num_moves"] == 1


def test_a_gradient_that_is_not_finite_moves_nothing():
    """The step is skipped, and masks stay."""
    model, optimizer, hook = make()
    step(model, optimizer, hook, number=1)
    before = hook.masks
    (model(torch.full((2, 8), float("inf"))).sum() * 0).backward()
    optimizer.zero_grad()
    hook.on_step(Moment(step=2, samples_seen=20, global_batch_size=10, model=model))
    assert all(torch.equal(mask, before[name]) for name, mask in hook.masks.items())
    assert hook.state_dict()["num_moves"] == 0


def test_a_step_that_is_begun_anew_counts_once():
    """Gradients of passes that were thrown away for want of memory are not among those that grow weights."""
    twin, other = make(), make()
    for model, optimizer, hook in (twin, other):
        step(model, optimizer, hook, number=1)
    functional.cross_entropy(twin[0](100 * torch.randn(5, 8)), torch.zeros(5, dtype=torch.int64)).backward()
    twin[1].zero_grad()
    for model, optimizer, hook in (twin, other):
        step(model, optimizer, hook, number=2)
    assert all(torch.equal(mask, other[2].masks[name]) for name, mask in twin[2].masks.items())
    assert twin[2].state_dict()["num_moves"] == 1


def test_the_meter_sees_the_trained_weights_alone():
    """|G|² and tr(Σ) of one step over all samples are those of every sample's own gradient where the mask is."""
    model, _, hook = make("static")
    inputs, classes = torch.randn(40, 8), torch.randint(0, 3, (40,))
    with dptrain.attach(model, every=1) as meter:
        for sample in range(40):
            meter.begin(num_samples=1, weight=1 / 40)
            (functional.cross_entropy(model(inputs[[sample]]), classes[[sample]]) / 40).backward()
        meter.step()
        scale = meter.read()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(parameters, one, label):
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (one[None],)), label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(plain, inputs, classes)
    masked = {name: g * hook.masks.get(name, torch.tensor(True)) for name, g in gradients.items()}
    for parts, is_right in ((masked, True), (gradients, False)):
        flat = torch.cat([g.flatten(1) for g in parts.values()], dim=1).double()
        trace = float(flat.var(0).sum())
        square = float(flat.mean(0).square().sum()) - trace / 40
        found = (scale.noise_trace, scale.grad_sq_norm)
        assert (found == pytest.approx((trace, square), rel=1e-4)) == is_right


def train(rank, world_size, folder):
    often = SparsityConfig(method="rigl", sparsity=0.8, update_every_samples=32)
    Trainer(settings(Path(folder) / str(world_size), max_samples=192, sparsity=often), task="digits").run()


def test_masks_are_equal_on_any_number_of_replicas(tmp_path):
    """1, 2 and 4 replicas end with the same masks, which are not the first ones; parameters agree to rounding."""
    train(0, 1, tmp_path)
    for world_size in (2, 4):
        run_replicas(train, world_size=world_size, args=(str(tmp_path),))
    one, *others = (masks_of(tmp_path / str(world_size)) for world_size in (1, 2, 4))
    for masks in others:
        assert masks.keys() == one.keys()
        assert all(torch.equal(mask, one[name]) for name, mask in masks.items())
    state = load_newest(tmp_path / "4" / "checkpoints").state["hook"]
    assert next(iter(state.values()))["num_moves"] == 4


def test_a_sparse_run_is_resumed_bit_for_bit(tmp_path):
    """Killed between the step that keeps its gradient and the move, and elsewhere: same masks, same bytes."""
    attempt(tmp_path / "whole", config=settings(tmp_path / "whole"), task="digits")
    whole, masks = result_of(tmp_path / "whole"), masks_of(tmp_path / "whole")
    folder = tmp_path / "killed"
    for kill_at in (6, 11, 12, 22):
        with pytest.raises(Killed):
            attempt(folder, kill_at=kill_at, config=settings(folder), task="digits")
    attempt(folder, config=settings(folder), task="digits")
    assert_same(result_of(folder), whole)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(folder).items())


def test_a_branch_takes_the_masks_along(tmp_path):
    """A run that branches off goes on with the masks of the other one; without any there, its own are put on."""
    Trainer(settings(tmp_path / "one", max_samples=160), task="digits").run()
    static = SparsityConfig(method="static", sparsity=0.8)
    origin = max((tmp_path / "one" / "checkpoints").iterdir())
    more = {"max_samples": 320, "branch_from": str(origin), "sparsity": static}
    Trainer(settings(tmp_path / "two", **more), task="digits").run()
    before, after = masks_of(tmp_path / "one"), masks_of(tmp_path / "two")
    assert all(torch.equal(mask, before[name]) for name, mask in after.items())
    Trainer(settings(tmp_path / "dense", max_samples=160, sparsity=SparsityConfig()), task="digits").run()
    more["branch_from"] = str(max((tmp_path / "dense" / "checkpoints").iterdir()))
    Trainer(settings(tmp_path / "three", **more), task="digits").run()
    saved = load_newest(tmp_path / "three" / "checkpoints")
    for name, mask in saved.tensors("hook").items():
        weight = saved.tensors("model")[name.partition("/")[2]]
        assert not weight[~mask].any()
        assert weight[mask].any()


def test_the_ledger_has_the_flops_by_density(tmp_path):
    """Uniform masks on all layers leave their density of the FLOPs; a dense run has no such column."""
    half = SparsityConfig(method="static", sparsity=0.75, distribution="uniform")
    found = Trainer(settings(tmp_path / "sparse", sparsity=half), task="digits").run()
    assert found["sparse_flops"] / found["flops"] == pytest.approx(0.25)
    dense = Trainer(settings(tmp_path / "dense", sparsity=SparsityConfig()), task="digits").run()
    assert "sparse_flops" not in dense
    assert dense["flops"] == found["flops"]
    assert json.loads((tmp_path / "sparse" / "summary.json").read_text())["sparse_flops"] == found["sparse_flops"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"precision": "bf16_parameters"}, "keeps copies of the weights"),
        ({"model": ModelConfig(lora_rank=4, lora_targets="0")}, "freezes the layers"),
        ({"optimizer": OptimizerConfig(average_decay=0.9)}, "average weights of different masks"),
    ],
)
def test_what_masks_cannot_go_with_is_refused(tmp_path, more, reason):
    """Each in one sentence, before anything is built."""
    with pytest.raises(ConfigError, match=reason):
        settings(tmp_path, **more)


def test_every_weight_of_a_task_can_be_sparse(tmp_path):
    """The default run's GPT trains with RigL: four fifths of its linear weights are zero at the end."""
    more = {"task": "pysource", "task_options": {"width": 32, "depth": 1}, "max_samples": 160}
    Trainer(settings(tmp_path, **more)).run()
    weights = load_newest(tmp_path / "checkpoints").tensors("model")
    masks = masks_of(tmp_path)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == pytest.approx(0.2 * total, rel=0.01)
    assert not any(weights[name.partition("/")[2]][~mask].any() for name, mask in masks.items())
