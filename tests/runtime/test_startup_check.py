"""What replicas compare before they start: equal things pass, and whatever differs is named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dptrain.errors import ConfigError
from dptrain.runtime.startup_check import check_agreement, check_device, check_same_loss, model_digests
from dptrain.train import ExecutionConfig, TrainConfig
from tests.replicas import run_replicas

CPU = torch.device("cpu")


def test_one_process_agrees_with_itself():
    """Without a process group nothing is compared."""
    check_agreement({"the settings": 1}, device=CPU)


def test_replicas_share_a_gpu_only_where_that_is_asked_for(monkeypatch):
    """Two replicas on one GPU are refused, with the setting that allows it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"execution\.share_devices"):
        check_device(TrainConfig())
    check_device(TrainConfig(execution=ExecutionConfig(share_devices=True)))


class Scaled(nn.Module):
    """Two buffers of one shape, registered in an order that may differ."""

    def __init__(self, *, first="mean", second="scale", persistent=True):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        for name in (first, second):
            self.register_buffer(name, torch.zeros(2), persistent=persistent)


def model_that_differs(rank, how):
    torch.manual_seed(5 if how != "values" else rank)
    if how == "buffers in another order":
        return Scaled() if rank == 0 else Scaled(first="scale", second="mean")
    if how == "hidden buffers in another order":
        names = {} if rank == 0 else {"first": "scale", "second": "mean"}
        return Scaled(**names, persistent=False)
    model = Scaled()
    if how == "one more parameter" and rank == 1:
        model.extra = nn.Parameter(torch.zeros(1))
    if how == "another dtype" and rank == 1:
        model.layer.weight.data = model.layer.weight.data.double()
    if how == "a frozen bias" and rank == 1:
        model.layer.bias.requires_grad_(requires_grad=False)
    if how == "a dropout rate":
        model.dropout = nn.Dropout(0.1 + 0.1 * rank)
    if how == "a buffer's value" and rank == 1:
        model.scale.add_(1)
    return model


FORM = "the names, order and shapes of the model's parameters and buffers"
VALUES = "the model's initial values"
TRAINED = "which of the model's parameters require a gradient"
MODULES = "the settings of the model's modules, such as a dropout rate"
DIFFERENCES = {
    "values": [VALUES],
    "a buffer's value": [VALUES],
    "buffers in another order": [FORM],
    "hidden buffers in another order": [FORM],
    "one more parameter": [FORM, VALUES, TRAINED],
    "a frozen bias": [TRAINED],
    "a dropout rate": [MODULES],
    "another dtype": [FORM, VALUES],
    "nothing": [],
}


def compare_models(rank, world_size):
    found = {}
    for how in DIFFERENCES:
        try:
            check_agreement(model_digests(model_that_differs(rank, how)), device=CPU)
            found[how] = ""
        except ConfigError as error:
            found[how] = str(error)
        dist.barrier()
    return found


def test_models_that_differ_are_refused_on_all_replicas_by_what_differs():
    """Names, order, shapes, dtypes or values of parameters and buffers, which DDP pairs by their place alone."""
    first, second = run_replicas(compare_models, world_size=2)
    assert first == second
    for how, differing in DIFFERENCES.items():
        for name in (FORM, VALUES, TRAINED, MODULES):
            assert (name in first[how]) == (name in differing), how


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_tensors_of_any_kind_have_a_digest(dtype):
    """Also empty ones, and those without a dimension."""
    model = nn.Module()
    model.register_buffer("empty", torch.zeros(0, dtype=dtype))
    model.register_buffer("one", torch.ones((), dtype=dtype))
    other = nn.Module()
    other.register_buffer("empty", torch.zeros(0, dtype=dtype))
    other.register_buffer("one", torch.zeros((), dtype=dtype))
    assert model_digests(model)[FORM] == model_digests(other)[FORM]
    assert model_digests(model)[VALUES] != model_digests(other)[VALUES]


def losses_compared(rank, world_size, pairs):
    refused = []
    for pair in pairs:
        try:
            check_same_loss(pair[rank], device=CPU)
        except ConfigError as error:
            refused.append(str(error))
        else:
            refused.append(None)
    return refused


def test_replicas_with_another_loss_are_refused():
    """Another sign or weight is named with both losses; rounding, and a loss that cannot be compared, are not."""
    pairs = [(1.0, -1.0), (2.0, 3.0), (1.0, 1.0 + 1e-5), (None, 1.0), (0.0, 0.0), (-1e-9, 1e-9)]
    first, second = run_replicas(losses_compared, world_size=2, args=(pairs,))
    assert first == second
    assert "-1 on one, 1 on another" in first[0]
    assert "2 on one, 3 on another" in first[1]
    assert first[2:] == [None] * 4
