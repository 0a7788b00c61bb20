"""Another run's optimizer state is refused by ours and taken by torch's, which is why the state by name is our own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dptrain.checkpoint.state import pack_optimizer, unpack_optimizer
from dptrain.errors import CheckpointError

ANOTHER_CLASS = (nn.Linear(3, 2), torch.optim.SGD)
ANOTHER_SHAPE = (nn.Linear(3, 5), torch.optim.AdamW)


def stepped(model, of=torch.optim.AdamW):
    optimizer = of(model.parameters(), lr=0.1)
    model(torch.ones(1, 3, dtype=model.weight.dtype)).sum().backward()
    optimizer.step()
    return optimizer


def names(model):
    return {parameter: name for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("model", "kind"), [ANOTHER_CLASS, ANOTHER_SHAPE])
def test_state_that_does_not_fit_is_refused_where_torch_takes_it(model, kind):
    """AdamW's state in SGD, and moments of another shape: a run must not go on from either."""
    source = nn.Linear(3, 2)
    optimizer = stepped(source)
    tensors, state = pack_optimizer(optimizer, names=names(source))

    with pytest.raises(CheckpointError):
        unpack_optimizer(kind(model.parameters(), lr=0.1), names=names(model), tensors=tensors, state=state)

    taken = kind(model.parameters(), lr=0.1)
    set_optimizer_state_dict(model, taken, copy.deepcopy(get_optimizer_state_dict(source, optimizer)))
    assert taken.state[model.weight]["exp_avg"].shape == source.weight.shape


def test_state_keeps_its_dtype_where_torch_casts_it_to_the_parameters():
    """float32 moments of a bfloat16 parameter would lose their digits on the way."""
    source = nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = stepped(source)
    wide = optimizer.state[source.weight]["exp_avg"].float() + 1e-4
    optimizer.state[source.weight]["exp_avg"] = wide
    tensors, state = pack_optimizer(optimizer, names=names(source))

    ours, theirs = (torch.optim.AdamW(source.parameters(), lr=0.1) for _ in range(2))
    unpack_optimizer(ours, names=names(source), tensors=tensors, state=state)
    set_optimizer_state_dict(source, theirs, copy.deepcopy(get_optimizer_state_dict(source, optimizer)))
    assert ours.state[source.weight]["exp_avg"].equal(wide)
    assert theirs.state[source.weight]["exp_avg"].dtype == torch.bfloat16


def test_reading_state_takes_no_step_where_torch_takes_one():
    """An optimizer before its first step has no state; torch's function has it make some, by a step."""
    source = nn.Linear(3, 2)
    ours, theirs = (torch.optim.AdamW(source.parameters(), lr=0.1) for _ in range(2))
    pack_optimizer(ours, names=names(source))
    get_optimizer_state_dict(source, theirs)
    assert not ours.state
    assert theirs.state[source.weight]["step"] == 1
