"""A small model, its micro-batches, and the noise scale from gradients that no wrapper has touched."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dptrain.noise import (
    MomentSums,
    PresentState,
    Smoothing,
    SquaredNorms,
    noise_scale,
    present_moments,
    present_updated,
    smoothed,
    unbiased_moments,
)

STEPS, ACCUMULATION, MICRO, RATE = 4, 2, 5, 0.05


class Block(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inside = nn.Linear(8, 8)
        self.reentrant = reentrant

    def forward(self, x):
        def body(x):
            return x + torch.tanh(self.inside(x))

        if self.reentrant is None:
            return body(x)
        return checkpoint(body, x, use_reentrant=self.reentrant)


class Model(nn.Module):
    """Two blocks, a weight that `first` and `last` share, and a frozen parameter."""

    def __init__(self, *, reentrant=None):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block(reentrant), Block(reentrant)])
        self.last = nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.head = nn.Linear(8, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def make_model(**settings):
    torch.manual_seed(1)
    return Model(**settings)


def micro_batch(step, micro_step, rank, size=MICRO):
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro_step + rank)
    return torch.randn(size, 8, generator=generator), torch.randn(size, 2, generator=generator)


def mean_loss(model, x, y):
    return ((model(x).float() - y) ** 2).sum(1).mean()


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(
    model, rank, *, meter=None, no_sync=contextlib.nullcontext, scale=1.0, steps=STEPS, cast=None, optimizer=None
):
    """Train a wrapped model in the plainest loop; return its parameters. `no_sync` is entered for all but the last."""
    optimizer = optimizer or torch.optim.SGD(trained(model), lr=RATE)
    for step in range(steps):
        for micro_step in range(ACCUMULATION):
            last = micro_step == ACCUMULATION - 1
            with contextlib.nullcontext() if last else no_sync():
                x, y = micro_batch(step, micro_step, rank)
                with contextlib.nullcontext() if cast is None else torch.autocast("cpu", dtype=cast):
                    loss = mean_loss(model, x, y)
                (loss / ACCUMULATION * scale).backward()
        if meter is not None:
            meter.step()
        for p in trained(model):
            p.grad.div_(scale)
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p.detach()).clone() for p in model.parameters()]


def gradient(model, batch, cast=None):
    with contextlib.nullcontext() if cast is None else torch.autocast("cpu", dtype=cast):
        loss = mean_loss(model, *batch)
    return [g.double() for g in torch.autograd.grad(loss, trained(model))]


def reference(world_size, *, part=slice(None), accumulated=False, cast=None, steps=STEPS, sizes=None, every=1):
    """Return (tr(Σ), |G|²) over `part` of the trained parameters, along the path that plain gradients take.

    That of a part is over the window, as groups are read; that of the whole is the present.

    `sizes[rank][micro_step]` are unequal micro-batches whose losses are summed, not averaged, over samples.
    """
    model, sums, present = make_model(), MomentSums(), PresentState()
    for step in range(steps):
        keys = [(rank, micro_step) for rank in range(world_size) for micro_step in range(ACCUMULATION)]
        counts = [MICRO if sizes is None else sizes[rank][micro_step] for rank, micro_step in keys]
        gradients = [
            gradient(model, micro_batch(step, micro_step, rank, size), cast)
            for (rank, micro_step), size in zip(keys, counts, strict=True)
        ]
        shares = [count / sum(counts) for count in counts]
        mean = [sum(w * g for w, g in zip(shares, parts, strict=True)) for parts in zip(*gradients, strict=True)]
        small, small_sizes = gradients, counts
        if accumulated:
            small = [
                [sum(parts) / ACCUMULATION for parts in zip(*gradients[i : i + ACCUMULATION], strict=True)]
                for i in range(0, len(keys), ACCUMULATION)
            ]
            small_sizes = [MICRO * ACCUMULATION] * world_size
        norms = SquaredNorms.of([sq_norm(g[part]) for g in small], sizes=small_sizes, large_sq_norm=sq_norm(mean[part]))
        if step % every == 0:
            sums = Smoothing().update(sums, unbiased_moments(norms))
            present = present_updated(present, unbiased_moments(norms))
        factor = 1 if sizes is None else sum(counts) / world_size
        with torch.no_grad():
            for p, g in zip(trained(model), mean, strict=True):
                p.sub_((RATE * factor * g).float())
    scale = noise_scale(present_moments(present) if part == slice(None) else smoothed(sums))
    return scale.noise_trace, scale.grad_sq_norm


def sq_norm(tensors):
    return sum(float((g.double() ** 2).sum()) for g in tensors)


def pair(scale):
    return scale.noise_trace, scale.grad_sq_norm
