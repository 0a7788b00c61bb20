"""Sharded state: packed whole on rank 0, bit for bit, and taken up by any number of ranks, sharded or not."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dptrain.checkpoint.state import pack_model, pack_optimizer, unpack_model, unpack_optimizer
from dptrain.checkpoint.store import load_newest, save_checkpoint
from dptrain.errors import CheckpointError
from tests.replicas import run_replicas


class Model(nn.Module):
    """Sizes that no world size divides, tied weights, a parameter smaller than the world, buffers, frozen ones."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(6, 5).requires_grad_(requires_grad=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = torch.tanh(block(hidden))
        return self.head(self.norm(hidden) * self.scale).logsumexp(-1).mean() + self.frozen(hidden).mean()


OPTIMIZERS = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, betas=(0.8, 0.97)),
    "adamw fused": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
}


def build(kind, *, sharded, seed=0):
    torch.manual_seed(seed)
    model = Model()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    split = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    return model, OPTIMIZERS[kind]([{"params": split[0]}, {"params": split[1], "weight_decay": 0.0}])


def names_of(model):
    return {parameter: name for name, parameter in model.named_parameters()}


def train(model, optimizer, *, steps):
    """The same samples on every rank, so that the number of ranks changes no average."""
    for step in steps:
        optimizer.zero_grad()
        model(torch.randint(11, (5,), generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()


def pack(model, optimizer):
    tensors, state = pack_optimizer(optimizer, names=names_of(model))
    return {"model": pack_model(model), "optimizer": tensors}, state


def restore(folder, model, optimizer):
    found = load_newest(folder)
    unpack_model(model, found.tensors("model"))
    names = names_of(model)
    unpack_optimizer(optimizer, names=names, tensors=found.tensors("optimizer"), state=found.state["optimizer"])


def bits(tensors):
    return {
        f"{name}/{key}": (str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist())
        for name, group in tensors.items()
        for key, tensor in group.items()
    }


def train_and_save(folder, kind, *, sharded, rank=0):
    """Train three steps, save on rank 0, and return what was saved."""
    model, optimizer = build(kind, sharded=sharded)
    train(model, optimizer, steps=range(3))
    tensors, state = pack(model, optimizer)
    if rank == 0:
        save_checkpoint(folder, step=3, tensors=tensors, state={"optimizer": state})
    return bits(tensors), state


def goes_on(rank, folder):
    """Train five steps, restore those after two into another model, train it to five as well: one and the same?"""
    model, optimizer = build("adamw", sharded=True)
    train(model, optimizer, steps=range(2))
    tensors, state = pack(model, optimizer)
    if rank == 0:
        save_checkpoint(folder, step=2, tensors=tensors, state={"optimizer": state})
    dist.barrier()
    train(model, optimizer, steps=range(2, 5))
    again, its_optimizer = build("adamw", sharded=True, seed=1)
    restore(folder, again, its_optimizer)
    train(again, its_optimizer, steps=range(2, 5))
    return bits(pack(model, optimizer)[0]) == bits(pack(again, its_optimizer)[0])


def is_the_same_after_evaluation():
    """A forward pass without a backward pass leaves the root's parameters gathered in the modules."""
    model, optimizer = build("adamw", sharded=True)
    train(model, optimizer, steps=range(1))
    before = bits(pack(model, optimizer)[0])
    model.eval()
    with torch.no_grad():
        model(torch.arange(5))
    packed = {"model": pack_model(model), "optimizer": pack_optimizer(optimizer, names=names_of(model))[0]}
    return bits(packed) == before


def refusals():
    """Return what a model of another shape, and an optimizer whose state has another shape, are told."""
    model, _ = build("sgd", sharded=True)
    before = model.embed.weight.to_local().clone()
    other = {name: tensor.clone() for name, tensor in Model().state_dict().items() if name != "head.weight"}
    other["blocks.0.weight"] = torch.zeros(6, 7)
    with pytest.raises(CheckpointError) as caught:
        unpack_model(model, other)
    assert model.embed.weight.to_local().equal(before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.blocks[0].weight
    optimizer.state[weight]["rows"] = weight.detach().new_zeros(6)
    with pytest.raises(CheckpointError) as refused:
        pack_optimizer(optimizer, names=names_of(model))
    return str(caught.value), str(refused.value)


def all_at_world_2(rank, world_size, folder):
    return {
        "saved": {kind: train_and_save(folder / kind, kind, sharded=True, rank=rank) for kind in OPTIMIZERS},
        "goes on": goes_on(rank, folder / "goes on"),
        "after evaluation": is_the_same_after_evaluation(),
        "refusals": refusals(),
    }


def resave(folder, kind, *, sharded):
    """Load into a model of another seed that has trained, and return what would be saved then."""
    model, optimizer = build(kind, sharded=sharded, seed=1)
    train(model, optimizer, steps=range(7, 8))
    restore(folder, model, optimizer)
    assert model.head.weight is model.embed.weight
    tensors, state = pack(model, optimizer)
    return bits(tensors), state


def resave_all(rank, world_size, folder):
    return {
        (name, sharded): resave(folder / name, name.removeprefix("whole "), sharded=sharded)
        for name in (*OPTIMIZERS, "whole adamw")
        for sharded in (False, True)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all checkpoints of this file are."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def at_world_2(folder):
    """What each of two ranks found: replicas take seconds to start, so they do everything at once."""
    return run_replicas(all_at_world_2, world_size=2, args=(folder,))


@pytest.fixture(scope="module")
def saved(folder, at_world_2):
    """What the checkpoints hold: three that two ranks wrote, and one of a model without shards."""
    whole = train_and_save(folder / "whole adamw", "adamw", sharded=False)
    return {**at_world_2[0]["saved"], "whole adamw": whole}


def test_rank_0_alone_keeps_what_is_whole(at_world_2):
    """The others have what is not sharded, which costs them nothing, and the same JSON."""
    for kind in OPTIMIZERS:
        (tensors, state), (elsewhere, its_state) = (found["saved"][kind] for found in at_world_2)
        assert state == its_state
        assert "model/embed.weight" in tensors
        assert all("/step/" in name or "running" in name or "num_batches" in name for name in elsewhere)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_checkpoint_loads_at_any_world_size_with_shards_and_without(folder, saved, world_size):
    """Loaded and gathered again it is equal to the bit; what was written without shards is, too."""
    found = run_replicas(resave_all, world_size=world_size, args=(folder,))[0]
    for (name, sharded), resaved in found.items():
        assert resaved == saved[name], (name, sharded)


def test_training_goes_on_as_if_never_stopped(at_world_2):
    """What is restored is not only equal, it trains: parameters, moments, counters, buffers are where they belong."""
    assert [found["goes on"] for found in at_world_2] == [True, True]


def test_packing_after_an_evaluation_finds_the_shards(at_world_2):
    """FSDP keeps the root gathered then; the state dict puts that right, and ties are found as before."""
    assert [found["after evaluation"] for found in at_world_2] == [True, True]


def test_what_does_not_fit_is_refused_on_every_rank_alike(at_world_2):
    """Shapes are compared whole, not shard by shard; nothing is changed and no rank waits for another."""
    for found in at_world_2:
        sentence, about_state = found["refusals"]
        assert "'blocks.0.weight' is float32[6, 6] here and float32[6, 7] in the checkpoint" in sentence
        assert "'rows/blocks.0.weight' is sharded and of shape (6,), its parameter of shape (6, 6)" in about_state
