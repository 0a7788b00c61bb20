"""Which modules are a model's blocks, how replicas make up shards, and how often a compiled model compiles."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from dptrain.config.execution import ExecutionConfig
from dptrain.cost.flops import FlopCounter
from dptrain.errors import ConfigError
from dptrain.exchange import AllReduce
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.train.execution.wrapping import find_blocks, mesh_shape, wrap


def test_blocks_are_the_repeated_ones():
    """Of a GPT its blocks; of a plain chain its layers with parameters."""
    model = Gpt(GptConfig(width=16, depth=3, heads=2))
    assert find_blocks(model) == list(model.blocks)
    chain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert find_blocks(chain) == [chain[0], chain[2]]


def test_shards_must_make_up_the_replicas():
    """Fsdp shards over all; hsdp over so many, which must divide them."""
    assert mesh_shape(ExecutionConfig(wrapper="fsdp"), world_size=6) == ((6,), ("shard",))
    assert mesh_shape(ExecutionConfig(wrapper="hsdp", shard_size=2), world_size=6) == ((3, 2), ("replicate", "shard"))
    with pytest.raises(ConfigError, match="4 does not divide 6"):
        mesh_shape(ExecutionConfig(wrapper="hsdp", shard_size=4), world_size=6)


class Own(nn.Module):
    """A module of a user's own file, which dynamo treats otherwise than torch's."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, batch):
        return self.last(torch.tanh(self.first(batch)))


@pytest.mark.parametrize("make", [Own, lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))])
def test_a_compiled_model_stays_compiled_beside_the_flop_counter(make):
    """The counted pass runs as written; from the next one on each size is one graph, whatever is accumulated."""
    torch.compiler.reset()
    compiles = CompileCounter()
    name = f"counting {len(torch._dynamo.list_backends(exclude_tags=()))}"
    torch._dynamo.register_backend(compiles, name=name)
    execution = ExecutionConfig(compile="model", compile_backend=name)
    wrapped = wrap(make(), exchange=AllReduce(), execution=execution, precision="no", device=torch.device("cpu"))
    flops, calls = FlopCounter(), 0
    for accumulation_steps, size in ((2, 4), (4, 4), (2, 4), (1, 8), (3, 8), (2, 4)):
        for _ in range(accumulation_steps):
            batch = torch.randn(size, 4)
            with flops.counting(batch, num_samples=size):
                wrapped(batch).sum().backward()
            calls += 1
    assert calls == 14
    assert compiles.frame_count == 2  # one for each size of micro-batch
    assert flops.take_per_sample() == 3 * 2 * (4 * 4 + 4 * 2) - 2 * 4 * 4  # no gradient of the input
    torch.compiler.reset()


@pytest.mark.parametrize("checkpointing", ["off", "blocks"])
@pytest.mark.parametrize("compiled", ["blocks", "model"])
@pytest.mark.parametrize("make", [Own, lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))])
def test_a_copy_of_a_compiled_model_has_parameters_of_its_own(make, compiled, checkpointing):
    """As the average of the weights is one: it computes with what it holds, whatever becomes of the model."""
    torch.compiler.reset()
    model = make()
    execution = ExecutionConfig(compile=compiled, compile_backend="eager", activation_checkpointing=checkpointing)
    wrap(model, exchange=AllReduce(), execution=execution, precision="no", device=torch.device("cpu"))
    batch = torch.randn(3, 4)
    before = model(batch)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(batch), before)
    assert not model(batch).any()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(batch).any()
    torch.compiler.reset()


def test_inductor_trains_as_eager_does():
    """On a CPU with a compiler of C++: the same losses to float tolerance."""
    import shutil

    if not shutil.which("g++"):
        pytest.skip("inductor needs a compiler of C++")
    torch.compiler.reset()
    losses = []
    for compile_what in ("off", "model"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        wrapped = wrap(
            model,
            exchange=AllReduce(),
            execution=ExecutionConfig(compile=compile_what),
            precision="no",
            device=torch.device("cpu"),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        losses.append([])
        for _ in range(3):
            loss = wrapped(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.compiler.reset()
