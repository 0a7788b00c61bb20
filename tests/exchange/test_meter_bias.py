"""What a meter reads under each kind of exchange: the bias of each codec, and refusals with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dptrain
from dptrain.errors import ObservationError
from dptrain.exchange import AllReduce, Codistillation, Compressed, Ensemble, LocalUpdates, RandomBases
from tests.replicas import run_replicas

STEPS = 150
CODECS = ("fp16", "bf16", "int8")
REFUSED = {
    "powersgd": lambda: Compressed("powersgd"),
    "random_bases": RandomBases,
    "local_updates": LocalUpdates,
    "codistillation": Codistillation,
    "ensemble": Ensemble,
}


def read(rank, exchange, *, method):
    """|G|² and tr(Σ) at fixed parameters, of the same batches under every exchange."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    wrapped = exchange.wrap(model)
    hooked = {"method": "hook", "comm_hook": exchange.hook()} if method == "hook" else {}
    meter = dptrain.attach(wrapped, every=1, **hooked)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x = torch.randn(8, 8, generator=generator)
        y = x[:, :4] + torch.randn(8, 4, generator=generator)
        (wrapped(x) - y).square().mean().backward()
        meter.step()
        model.zero_grad()
    meter.remove()
    scale = meter.read_window()
    return {"grad": scale.grad_sq_norm, "trace": scale.noise_trace, "dropped": meter.reading.noise_scale.warnings}


def read_all(rank, world_size):
    found = {}
    for method in ("parameters", "hook"):
        found[f"exact {method}"] = read(rank, AllReduce(), method=method)
        for codec in CODECS:
            exchange = Compressed(codec, registers=method == "parameters")
            found[f"{codec} {method}"] = read(rank, exchange, method=method)
    for name, make in REFUSED.items():
        with pytest.raises(ObservationError) as raised:
            dptrain.attach(make().wrap(nn.Linear(40, 40)))
        found[name] = str(raised.value)
    return found


@pytest.fixture(scope="module")
def readings():
    return run_replicas(read_all, world_size=2, timeout_s=240)[0]


@pytest.mark.parametrize("method", ["parameters", "hook"])
@pytest.mark.parametrize(("codec", "most"), [("fp16", 1e-4), ("bf16", 2e-3), ("int8", 0.03)])
def test_a_codec_moves_both_moments_by_less_than_its_rounding(readings, codec, method, most):
    """Small gradients are seen exact and the combined one rounded: the bias is the square of the rounding's norm."""
    exact, found = readings[f"exact {method}"], readings[f"{codec} {method}"]
    assert found["grad"] == pytest.approx(exact["grad"], rel=most)
    assert found["trace"] == pytest.approx(exact["trace"], rel=most)
    assert found != exact


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_with_the_reason(readings, name):
    """Each error says why there is no noise scale, and what to do."""
    assert "there is no noise scale here" in readings[name]
    assert "measure" in readings[name]
