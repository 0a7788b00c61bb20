"""What a framework's run should have measured: plain gradients of the micro-batches that its model was seen to get."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dptrain.noise import PresentState, SquaredNorms, noise_scale, present_moments, present_updated, unbiased_moments

DIM = 6


class Regression(nn.Module):
    """Returns the mean squared error over its batch in three guises, one for each framework."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(DIM, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x, y):
        return {"loss": ((self.net(x) - y) ** 2).sum(1).mean()}


class Samples(torch.utils.data.Dataset):
    """Noisy outputs of a fixed map: sample i is a function of i."""

    def __init__(self, num_samples):
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(num_samples, DIM, generator=generator)
        self.y = self.x[:, :2] + 0.5 * torch.randn(num_samples, 2, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


def recorded(model):
    """Return a list that fills with (parameters, inputs) of each forward pass in training."""
    records = []

    def keep(module, args, kwargs):
        if module.training:
            inputs = {name: value.tolist() for name, value in kwargs.items() if name != "num_items_in_batch"}
            records.append((parameters_to_vector(module.parameters()).tolist(), inputs))

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return records


def parameters_of(model):
    return parameters_to_vector(model.parameters()).tolist()


def windows(records):
    """Return [(parameters, [inputs of each micro-batch])] of one rank: an update changes the parameters."""
    return [(key, [inputs for _, inputs in group]) for key, group in groupby(records, key=lambda record: record[0])]


def measured_by_hand(model, records_of_ranks, *, weight=lambda _: 1.0, every=1):
    """Return ((tr(Σ), |G|²), [(parameters, micro-batches per rank, mean gradient)]) along the run's own path.

    Fails where the ranks' parameters are not the same bits at each step: then they stepped on gradients of their own.
    """
    sums, steps = PresentState(), []
    for parts in zip(*(windows(records) for records in records_of_ranks), strict=True):
        parameters = parts[0][0]
        assert all(other == parameters for other, _ in parts), "the ranks' parameters differ"
        vector_to_parameters(torch.tensor(parameters), model.parameters())
        micro_batches = [inputs for _, inputs_of_rank in parts for inputs in inputs_of_rank]
        gradients = [_gradient(model, inputs) for inputs in micro_batches]
        weights = [weight(inputs) for inputs in micro_batches]
        weights = [w / sum(weights) for w in weights]
        mean = sum(w * g for w, g in zip(weights, gradients, strict=True))
        norms = SquaredNorms.of(
            [float(g @ g) for g in gradients],
            sizes=[len(next(iter(inputs.values()))) for inputs in micro_batches],
            large_sq_norm=float(mean @ mean),
            weights=weights,
        )
        moments = unbiased_moments(norms)
        # One small batch alone says nothing.
        if moments is not None and len(steps) % every == 0:
            sums = present_updated(sums, moments)
        steps.append((parameters, [len(inputs) for _, inputs in parts], mean.tolist()))
    pair = noise_scale(present_moments(sums))
    return (pair.noise_trace, pair.grad_sq_norm), steps


def _gradient(model, inputs):
    loss = model(**{name: torch.tensor(value) for name, value in inputs.items()})["loss"]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


def follows_sgd(steps, *, rate, last):
    """Whether each step went `rate(k)` down the mean gradient; `last` are the parameters at the end."""
    ends = [parameters for parameters, _, _ in steps[1:]] + [last]
    return all(
        torch.allclose(
            torch.tensor(end), torch.tensor(start) - rate(k) * torch.tensor(gradient, dtype=torch.float32), atol=1e-6
        )
        for k, ((start, _, gradient), end) in enumerate(zip(steps, ends, strict=True))
    )
