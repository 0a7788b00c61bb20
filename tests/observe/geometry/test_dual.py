"""The sign and spectral geometries in a loop: the pair of the dual norms that plain gradients have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise.dual import DualNorms, dual_moments, sign_factor, spectral_factor
from tests.replicas import run_replicas

MICRO, ACCUMULATION = 5, 2


def make_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(micro_step, rank):
    generator = torch.Generator().manual_seed(10 * micro_step + rank)
    return torch.randn(MICRO, 6, generator=generator), torch.randn(MICRO, 3, generator=generator)


def loss_of(model, micro_step, rank):
    x, y = batch(micro_step, rank)
    return (model(x) - y).square().sum(1).mean()


GROUPS = {"matrices": ("0.weight", "2.weight"), "vectors": ("0.bias", "2.bias")}
KINDS = {"matrices": "spectral", "vectors": "sign"}


def mixed(rank, world_size):
    """One step of two micro-batches; return the pairs by group."""
    bare, model = make_model(), make_model()
    named = dict(model.named_parameters())
    groups = {name: [named[key] for key in keys] for name, keys in GROUPS.items()}
    model = DistributedDataParallel(model)
    meter = dptrain.attach(model, every=1, groups=groups, geometry=KINDS)
    for micro_step in range(ACCUMULATION):
        (loss_of(model, micro_step, rank) / ACCUMULATION).backward()
    reading = meter.step()
    assert reading.geometry == "mixed"
    assert all(name.startswith("noise_scale/mixed/") for name in reading.as_metrics())
    again = dptrain.attach(DistributedDataParallel(bare), every=1, groups=_by_name(bare), geometry=KINDS)
    again.load_state_dict(meter.state_dict())
    assert again.read_groups() == meter.read_groups()
    return {name: (scale.noise_trace, scale.grad_sq_norm) for name, scale in reading.groups.items()}


def _by_name(model):
    named = dict(model.named_parameters())
    return {name: [named[key] for key in keys] for name, keys in GROUPS.items()}


def norm(kind, grad):
    return grad.abs().sum() if kind == "sign" else torch.linalg.svdvals(grad).sum()


def expected(world_size):
    """The same pairs from plain gradients: each replica's first micro-batch against the mean of all."""
    model = make_model()
    keys = [name for name, _ in model.named_parameters()]
    own = {}
    for rank in range(world_size):
        for micro_step in range(ACCUMULATION):
            found = torch.autograd.grad(loss_of(model, micro_step, rank), list(model.parameters()))
            own[rank, micro_step] = dict(zip(keys, (g.double() for g in found), strict=True))
    mean = {key: torch.stack([g[key] for g in own.values()]).mean(0) for key in keys}
    pairs = {}
    for name, members in GROUPS.items():
        kind = KINDS[name]
        factor = {k: sign_factor() if kind == "sign" else spectral_factor(*mean[k].shape) for k in members}
        firsts = [own[rank, 0] for rank in range(world_size)]
        norms = DualNorms(
            small=float(sum(norm(kind, g[k]) for g in firsts for k in members)) / world_size,
            large=float(sum(norm(kind, mean[k]) for k in members)),
            deviation=float(sum(norm(kind, g[k] - mean[k]) / factor[k] for g in firsts for k in members)) / world_size,
            size=MICRO,
            total=MICRO * ACCUMULATION * world_size,
        )
        moments = dual_moments(norms)
        pairs[name] = moments.noise_trace, moments.grad_sq_norm
    return pairs


def test_each_group_is_measured_in_its_own_norm():
    """Matrices in the nuclear norm beside vectors in the L1 norm, on two replicas, and through a saved state."""
    results = run_replicas(mixed, world_size=2)
    assert results[0] == results[1]
    for name, pair in expected(2).items():
        assert results[0][name] == pytest.approx(pair, rel=1e-4)


class Counted(TorchDispatchMode):
    """Counts what is launched."""

    def __init__(self):
        super().__init__()
        self.num_kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_kernels += not any(
            word in str(function) for word in ("view", "detach", "t.default", "slice", "select")
        )
        return function(*args, **(kwargs or {}))


def kernels(geometry):
    """Return the kernels of one measured step's closing, and of its micro-batches, by the sign geometry and without."""
    model = make_model()
    counts = []
    with dptrain.attach(model, every=1, geometry=geometry) as meter:
        for _ in range(2):
            with Counted() as counted:
                for micro_step in range(ACCUMULATION):
                    (loss_of(model, micro_step, 0) / ACCUMULATION).backward()
                meter.step()
            model.zero_grad()
            counts.append(counted.num_kernels)
    return counts[-1]


def test_the_sign_geometry_costs_a_handful_of_kernels_per_parameter():
    """A copy, a difference, three norms and their sums: at most 20 small kernels per parameter and measured step."""
    extra = kernels("sign") - kernels("sgd")
    assert 0 < extra <= 20 * 4 + 10


def test_what_it_cannot_measure_is_refused():
    """Vectors have no spectral norm, and a mapping must name each group; clipped gradients give no reading."""
    model = make_model()
    with pytest.raises(ObservationError, match="no spectral norm"):
        dptrain.attach(model, geometry="spectral")
    with pytest.raises(ObservationError, match="each of the groups"):
        dptrain.attach(model, geometry={"matrices": "spectral"}, groups=_by_name(model))
    with dptrain.attach(model, every=1, geometry="sign") as meter:
        for _ in range(3):
            for micro_step in range(ACCUMULATION):
                (loss_of(model, micro_step, 0) / ACCUMULATION).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            if _ == 0:
                assert not math.isfinite(meter.step().noise_scale.upper)
            else:
                meter.step()
            model.zero_grad()
        assert "right after the last backward" in meter.reason
