"""Which forward passes count, with what size, and that copies of a model are none of the meter's."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dptrain
from dptrain.observe.checks.reasons import DropLog
from dptrain.observe.loop.passes import ForwardPasses
from tests.replicas import run_replicas

STEPS = 12


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def measured(run, *, model=None, wrapped=lambda model: model, accumulation_steps=2, seed=2, **options):
    """Return (sums of the meter, its warnings, its reason) after `run(model, x)` gave each micro-batch's loss."""
    model = wrapped(model or make_model())
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(record=True) as reported, dptrain.attach(model, every=1, **options) as meter:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            model.zero_grad()
            for _ in range(accumulation_steps):
                (run(model, torch.randn(6, 4, generator=generator)) / accumulation_steps).backward()
            meter.step()
        return meter.state().sums, [str(w.message) for w in reported if "noise scale" in str(w.message)], meter.read()


def plain(model, x):
    return model(x).square().mean()


def with_a_metric(model, x):
    loss = plain(model, x)
    model(torch.ones(50, 4))  # gradients are on, but nothing goes backward from here
    return loss


def with_a_kept_metric(model, x):
    model.kept = model(torch.ones(50, 4))
    return plain(model, x)


def pair(model, x):
    return plain(model, x) + plain(model, x[:2])


@pytest.mark.parametrize("run", [with_a_metric, with_a_kept_metric])
def test_a_pass_without_a_backward_pass_has_no_size(run):
    """A metric's pass of 50 samples, before or after the training pass of 6, changes nothing."""
    assert measured(run)[0] == measured(plain)[0]


def test_several_passes_in_one_backward_are_asked_about():
    """Without `micro_batch_size` the steps are dropped with one warning; with it they count."""
    _, reported, scale = measured(pair)
    assert scale.num_steps == 0
    assert len(reported) == 1
    assert "micro_batch_size=" in reported[0]
    _, reported, scale = measured(pair, micro_batch_size=6)
    assert (reported, scale.num_steps, scale.num_samples) == ([], STEPS, STEPS * 12)


class Result:
    """An output that is no collection."""

    def __init__(self, out):
        self.out, self.parent = out, self


class ReturnsAnObject(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = make_model(), kind

    def forward(self, x):
        return self.kind(self.net(x))


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        (Result, lambda result: result.out),
        (lambda out: SimpleNamespace(inner=[{"out": out}]), lambda result: result.inner[0]["out"]),
        (lambda out: torch.distributions.Normal(out, 1.0), lambda policy: policy.loc),
    ],
    ids=["object", "namespace", "distribution"],
)
def test_several_passes_are_noticed_in_outputs_of_any_kind(kind, read):
    """Two passes of 6 samples and one backward pass are not one micro-batch of 6 because of what the model returns."""

    def two(model, x):
        return (read(model(x)).square().mean() + read(model(-x)).square().mean()) / 2

    _, reported, scale = measured(two, model=ReturnsAnObject(kind))
    assert scale.num_steps == 0
    assert "micro_batch_size=" in reported[0]
    _, reported, scale = measured(lambda model, x: read(model(x)).square().mean(), model=ReturnsAnObject(kind))
    assert (reported, scale.num_steps) == ([], STEPS)


class Pools(nn.Module):
    """Means over three rows, as of a graph's nodes."""

    def __init__(self):
        super().__init__()
        self.net = make_model()

    def forward(self, x):
        return self.net(x).unflatten(0, (-1, 3)).mean(1)


def test_an_output_with_fewer_rows_than_inputs_is_asked_about():
    """Six nodes are two graphs: the steps are dropped with one warning, and count by the function that is given."""
    _, reported, scale = measured(plain, model=Pools())
    assert scale.num_steps == 0
    assert len(reported) == 1
    assert "micro_batch_size=" in reported[0]
    _, reported, scale = measured(plain, model=Pools(), micro_batch_size=lambda x: len(x) // 3)
    assert (reported, scale.num_steps, scale.num_samples) == ([], STEPS, STEPS * 4)


def test_a_pass_whose_output_is_in_doubt_without_a_backward_pass_is_none():
    """A metric on another part of the model, or on one vector, is not what is trained on."""

    def beside(model, x):
        loss = plain(model, x)
        model(torch.ones(4))
        return loss

    assert measured(beside)[0] == measured(plain)[0]


def with_gradients_of_each_sample(model, x):
    def loss_of(parameters, sample):
        return torch.func.functional_call(model, parameters, sample).square().mean()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.vmap(torch.func.grad(loss_of), (None, 0))(parameters, x)
    return plain(model, x)


def test_gradients_of_single_samples_by_torch_func_are_no_passes():
    """They call the model with one sample and without a batch dimension, beside the training."""
    assert measured(with_gradients_of_each_sample)[:2] == measured(plain)[:2]


def test_a_model_that_is_called_under_vmap_is_asked_about():
    """There each call has one sample as its whole input, whose first dimension is none of samples."""
    _, reported, scale = measured(lambda model, x: torch.vmap(model)(x).square().mean())
    assert scale.num_steps == 0
    assert "meter.begin(num_samples=...)" in reported[0]


def pairs_under_the_hook(rank, world_size):
    wrapped = nn.parallel.DistributedDataParallel
    options = {"wrapped": wrapped, "accumulation_steps": 1, "method": "hook", "seed": rank}
    asked, given = measured(pair, **options), measured(pair, micro_batch_size=6, **options)
    return asked[1], asked[2].num_steps, given[1], given[2].num_steps, given[2].num_samples


def test_several_passes_are_asked_about_under_the_hook_too():
    """There passes are counted by their backward passes; with a size given, one backward is one micro-batch."""
    first, second = run_replicas(pairs_under_the_hook, world_size=2)
    assert "micro_batch_size=" in first[0][0]
    assert (len(first[0]), second[0]) == (1, [])
    assert first[1:] == (0, [], STEPS, STEPS * 12)


class ReturnsAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale = make_model(), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.net(x), self.scale


def test_a_parameter_in_the_output_is_no_pass_of_its_own():
    """CLIP returns its temperature beside its features: each backward pass reaches it, and it is one pass."""

    def scaled(model, x):
        out, scale = model(x)
        return (out * scale).square().mean()

    model = ReturnsAParameter()
    _, reported, scale = measured(scaled, model=model)
    assert (reported, scale.num_steps) == ([], STEPS)
    assert not model.scale._backward_hooks


def test_an_empty_micro_batch_drops_its_step():
    """A micro-batch without samples is no error in the middle of a run: its step does not count."""
    sizes = iter([6, 0, *[6] * 2 * STEPS])
    _, reported, scale = measured(lambda model, x: model(x[: next(sizes)]).square().sum())
    assert (reported, scale.num_steps) == ([], STEPS - 1)


def test_copies_are_none_of_the_meters():
    """A teacher that is called with gradients on is not counted, and a copied or saved model works without dptrain."""
    model = make_model()
    with dptrain.attach(model, every=1) as meter:
        teacher = copy.deepcopy(model)
        teacher(torch.ones(9, 4)).sum().backward()
        pickle.dumps(model)
        model(torch.ones(3, 4)).sum().backward()
        meter.step()
        saved = io.BytesIO()
        torch.save(model, saved)
    assert meter.read().num_samples <= 3
    program = (
        "import io, sys, torch; m = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False); "
        "m(torch.ones(2, 4)).sum().backward(); assert 'dptrain' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], input=saved.getvalue(), check=True, timeout=120)


class TimeFirst(nn.Module):
    """A recurrence of its own over (time, samples, width), which no module of torch tells of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.read, self.out = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.out(torch.tanh(self.read(x)).sum(0))


def test_an_output_that_begins_with_the_second_dimension_is_ambiguous():
    """Three time steps of five samples are not three samples: refused, and right once the size is given."""
    with pytest.raises(dptrain.errors.ObservationError, match=r"output with 5.*micro_batch_size="):
        measured(lambda model, x: plain(model, x.new_ones(3, 5, 2)), model=TimeFirst())
    _, reported, _ = measured(
        lambda model, x: plain(model, x[:, :2].expand(3, 6, 2)),
        model=TimeFirst(),
        micro_batch_size=lambda x: x.shape[1],
    )
    assert reported == []


def test_a_loop_that_closes_no_step_is_told():
    """No meter.step() while gradients are cleared: one warning, and the reason is kept until a step is closed."""
    model = make_model()
    with warnings.catch_warnings(record=True) as caught, dptrain.attach(model, every=1) as meter:
        warnings.simplefilter("always")
        for _ in range(25):
            model.zero_grad()
            model(torch.ones(2, 4)).mean().backward()
        assert ["steps are not closed" in str(w.message) for w in caught] == [True]
        assert "meter.step()" in meter.reading.reason
        meter.step()
        assert "not closed" not in (meter.reading.reason or "")


def test_many_passes_without_a_step_are_told():
    """Also where nothing is cleared or measured: 1,000 before the first step, a hundred times the longest after it.

    An evaluation has as many as it wants.
    """
    log = DropLog(None)
    passes = ForwardPasses(log)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for longest, limit in ((0, 1000), (16, 1600)):
            for _ in range(longest):
                passes.add(training=True)
            passes.close()
            for _ in range(3 * limit):  # an evaluation whose author forgot torch.no_grad()
                passes.add(training=False)
            for _ in range(limit):
                passes.add(training=True)
            assert log.not_closed is None
            passes.add(training=True)
            assert log.not_closed is not None
            passes.close()
            assert log.not_closed is None
            passes = ForwardPasses(log)


def test_an_evaluation_with_gradients_is_no_step_that_nobody_closes():
    """Passes in evaluation mode, without torch.no_grad(), are many and are not reported."""
    model = make_model()
    with warnings.catch_warnings(), dptrain.attach(model, every=1) as meter:
        warnings.simplefilter("error")
        model.eval()
        for _ in range(1100):
            model(torch.ones(2, 4))
        model.train()
        model(torch.ones(2, 4)).mean().backward()
        assert "not closed" not in (meter.reading.reason or "")
