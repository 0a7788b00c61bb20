"""Loops in which a meter could be wrong, from public bug reports: each is right, refused, or reported."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_sequence

import dptrain
from dptrain.errors import ObservationError
from tests.replicas import run_replicas

NUM_SAMPLES, WIDTH, STEPS = 256, 6, 120
_generator = torch.Generator().manual_seed(0)
X = torch.randn(NUM_SAMPLES, WIDTH, generator=_generator)
Y = X.sum(1, keepdim=True) * 0.3 + torch.randn(NUM_SAMPLES, 1, generator=_generator)


def make_model(**settings):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1), **settings)


class Loop:
    """A plain loop in DDP at a learning rate of 0, whose parts the misuses below replace."""

    steps, batch, options = STEPS, 4, {}

    def __init__(self, rank):
        self.generator = torch.Generator().manual_seed(100 + rank)
        self.bare = self.make()
        self.model = DistributedDataParallel(self.bare)
        self.prepare()
        self.meter = dptrain.attach(self.model, every=1, **self.options)
        self.optimizer = torch.optim.SGD(self.bare.parameters(), lr=0.0)

    def make(self):
        return make_model()

    def prepare(self):
        pass

    def inputs(self, i):
        return X[i]

    def loss(self, i, model=None):
        return mse_loss((model or self.model)(self.inputs(i)), Y[i])

    def draw(self):
        return torch.randint(0, NUM_SAMPLES, (self.batch,), generator=self.generator)

    def step(self, number):  # noqa: ARG002 - some loops look at it
        self.model.zero_grad()
        self.loss(self.draw()).backward()
        self.meter.step()
        self.optimizer.step()

    def truth(self):
        """tr(Σ) from each sample's own gradient."""
        parameters = [p for p in self.bare.parameters() if p.requires_grad]
        rows = []
        for k in range(NUM_SAMPLES):
            found = torch.autograd.grad(self.loss(torch.tensor([k]), self.bare), parameters, allow_unused=True)
            dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(parameters, found, strict=True)]
            rows.append(torch.cat([g.flatten() for g in map(as_real, dense)]).double())
        rows = torch.stack(rows)
        return float((rows - rows.mean(0)).square().sum(1).mean())


def as_real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class AdaptiveWeight(Loop):
    """A weight from the last layer's own gradient, taken before the backward pass."""

    def step(self, _):
        self.model.zero_grad()
        loss = self.loss(self.draw())
        torch.autograd.grad(loss, self.bare[2].weight, retain_graph=True)[0].norm()
        loss.backward()
        self.meter.step()


class AdaptiveWeightUnderTheHook(AdaptiveWeight):
    options = {"method": "hook"}  # noqa: RUF012 - never changed


class EvaluationMode(Loop):
    def prepare(self):
        self.model.eval()


class EvaluationModeUnderTheHook(EvaluationMode):
    options = {"method": "hook"}  # noqa: RUF012


class GradientPenalty(Loop):
    def loss(self, i, model=None):
        x = X[i].clone().requires_grad_()
        out = (model or self.model)(x)
        slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
        return mse_loss(out, Y[i]) + ((slope.norm(dim=1) - 1) ** 2).mean()


class Images(Loop):
    """The model takes a list of (3, 2, 1) images."""

    batch = 8

    def make(self):
        return Stacked()

    def inputs(self, i):
        return [X[k].reshape(3, 2, 1) for k in i]


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_model()

    def forward(self, images):
        return self.net(torch.stack([image.reshape(-1) for image in images]))


class CountedImages(Images):
    options = {"micro_batch_size": len}  # noqa: RUF012 - of the model's argument


class ImagesInATuple(Images):
    def inputs(self, i):
        return tuple(super().inputs(i))


class PackedSequences(Loop):
    """Sequences of one to three steps; what is counted are sequences."""

    def make(self):
        torch.manual_seed(1)
        return Recurrent()

    def inputs(self, i):
        return pack_sequence([X[k].reshape(3, 2)[: 1 + int(k) % 3] for k in i], enforce_sorted=False)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.RNN(2, 4), nn.Linear(4, 1)

    def forward(self, packed):
        return self.out(self.cell(packed)[1][0])


class TimeFirst(Loop):
    def make(self):
        return TakesTime()

    def inputs(self, i):
        return X[i].reshape(len(i), 3, 2).transpose(0, 1)


class TakesTime(Recurrent):
    def forward(self, x):
        return self.out(self.cell(x)[0][-1])


class SkippedSpike(Loop):
    """An update of too large a gradient is thrown away by the next step's zero_grad."""

    to_none = True

    def step(self, number):
        self.optimizer.zero_grad(set_to_none=self.to_none)
        (self.loss(self.draw()) * (1000.0 if number % 30 == 29 else 1.0)).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if norm < 200:
            self.meter.step(grad_norm=norm)


class SkippedSpikeInPlace(SkippedSpike):
    to_none = False


class SharpnessAware(Loop):
    """SAM: the gradient of a first pass is thrown away."""

    def step(self, _):
        i = self.draw()
        for _ in range(2):
            self.model.zero_grad()
            self.loss(i).backward()
        self.meter.step()


class SparseEmbedding(Loop):
    def make(self):
        return Words()

    def inputs(self, i):
        return torch.stack([i % 50, i * 7 % 50], 1)


class SparseEmbeddingUnderTheHook(SparseEmbedding):
    options = {"method": "hook"}  # noqa: RUF012


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.table, self.out = nn.Embedding(50, 4, sparse=True), nn.Linear(4, 1)

    def forward(self, ids):
        return self.out(self.table(ids).mean(1))


class ComplexParameter(Loop):
    def make(self):
        return Spectrum()


class Spectrum(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.filter, self.out = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(WIDTH, 1)

    def forward(self, x):
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=WIDTH))


class Stale(Loop):
    """The optimizer that clears has the head alone."""

    def step(self, _):
        self.bare[2].zero_grad()
        self.loss(self.draw()).backward()
        self.meter.step()


class AfterClearing(Loop):
    to_none = True

    def step(self, _):
        self.loss(self.draw()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.to_none)
        self.meter.step()


class AfterClearingInPlace(AfterClearing):
    to_none = False


class Clipped(Loop):
    def step(self, _):
        self.model.zero_grad()
        self.loss(self.draw()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.meter.step()


class Summing(Loop):
    """A communication hook that sums where DDP would average."""

    def prepare(self):
        def total(group, bucket):  # DDP refuses annotations that are strings
            future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0])

        self.model.register_comm_hook(None, total)


class BehindTheWrapper(Loop):
    def step(self, _):
        self.model.zero_grad()
        self.loss(self.draw(), self.bare).backward()
        self.meter.step()


class Twice(Loop):
    def step(self, number):
        super().step(number)
        self.meter.step()


def outcome(rank, world_size, loop_type):
    """Return (error or None, warnings, truth, tr(Σ), its standard error, steps) of a loop."""
    try:
        loop = loop_type(rank)
    except ObservationError as error:
        return str(error), [], None, None, None, 0, ""
    truth = loop.truth()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for number in range(loop.steps):
                loop.step(number)
            scale, reading = loop.meter.read(), loop.meter.reading
        except ObservationError as error:
            return str(error), [], truth, None, None, 0, ""
    reported = [str(w.message) for w in caught if "noise scale" in str(w.message)]
    return None, reported, truth, scale.noise_trace, scale.var_trace**0.5, scale.num_steps, str(reading)


def outcomes(rank, world_size, loops):
    return [outcome(rank, world_size, loop) for loop in loops]


RIGHT = (
    AdaptiveWeightUnderTheHook,
    EvaluationMode,
    EvaluationModeUnderTheHook,
    GradientPenalty,
    CountedImages,
    PackedSequences,
    SkippedSpike,
    SkippedSpikeInPlace,
    SharpnessAware,
    SparseEmbedding,
    ComplexParameter,
    Clipped,
    Summing,
)
REFUSED = {
    AdaptiveWeight: "method='hook'",
    Images: "micro_batch_size=",
    ImagesInATuple: "micro_batch_size=",
    TimeFirst: "micro_batch_size=",
    SparseEmbeddingUnderTheHook: "method='parameters'",
}
REPORTED = {
    Stale: "zero_grad",
    AfterClearing: "before optimizer.zero_grad",
    AfterClearingInPlace: "before the gradients are changed",
    BehindTheWrapper: "ddp.module",
    Twice: "once per optimizer step",
}


def test_unusual_loops_are_measured_right():
    """Tr(Σ) is that of the per-sample gradients within four standard errors and 35 %, without a warning."""
    for loop, found in zip(RIGHT, run_replicas(outcomes, world_size=2, args=(RIGHT,))[0], strict=True):
        error, reported, truth, trace, deviation, num_steps, _ = found
        assert error is None, (loop.__name__, error)
        assert reported == [], (loop.__name__, reported)
        assert num_steps >= 0.9 * STEPS, loop.__name__
        assert abs(trace / truth - 1) < 0.35, (loop.__name__, trace, truth)
        assert abs(trace - truth) < 4 * deviation, (loop.__name__, trace, truth, deviation)


def test_ambiguous_loops_are_refused_with_a_remedy():
    """The error names what to write instead."""
    found = run_replicas(outcomes, world_size=2, args=(tuple(REFUSED),))[0]
    for (loop, remedy), (error, *_) in zip(REFUSED.items(), found, strict=True):
        assert error is not None, loop.__name__
        assert remedy in error, (loop.__name__, error)


def test_misused_loops_are_reported_once_and_not_measured():
    """One warning from one rank has the remedy, the reading has the reason, and at most the first step counts."""
    results = run_replicas(outcomes, world_size=2, args=(tuple(REPORTED),))
    for (loop, remedy), found, other in zip(REPORTED.items(), *results, strict=True):
        error, reported, _, _, _, num_steps, text = found
        assert error is None, (loop.__name__, error)
        assert len(reported) == 1, (loop.__name__, reported)
        assert remedy in reported[0], (loop.__name__, reported)
        assert other[1] == [], loop.__name__
        if loop is Twice:  # each step's own close is right, the second one drops nothing but itself
            continue
        assert num_steps <= 1, loop.__name__
        assert remedy in text, (loop.__name__, text)


@pytest.mark.parametrize("call", [{"input_ids": torch.ones(3, 7), "position_ids": torch.ones(1, 7)}, {"x": X[:3]}])
def test_inputs_that_leave_no_doubt_are_counted(call):
    """What transformers' models call their inputs, and tensors that agree, need no `micro_batch_size`."""
    from dptrain.observe.loop.batch_size import batch_size

    assert batch_size(None, (), call) == 3
    assert batch_size(5, (), call) == 5
    with pytest.raises(ObservationError, match="micro_batch_size="):
        batch_size(None, (X[:3], X[:4]), {})
    with pytest.raises(ObservationError, match="without a tensor"):
        batch_size(None, (1.0,), {})
