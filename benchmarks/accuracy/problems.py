"""Problems whose gradient noise is known exactly, drawn many samples at a time; nothing is measured here.

The models hold no buffers: DDP would broadcast them before each forward pass, which is most of the time of a step
as small as these.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import TensorDataset

from dptrain.tasks import KnownAnswer, digits, exact_noise

COPIES = 16
"""Small problems are stacked in independent copies: φ stays, both moments grow, and a step tells that much more."""


@dataclass(frozen=True, kw_only=True)
class Elements:
    """Mean and variance of every element of a sample's gradient, in float64, flat in the order of the parameters."""

    mean: Tensor
    variance: Tensor

    def answer(self, *, scale: Tensor) -> KnownAnswer:
        """Return what there is to be found where element i of each gradient is multiplied by `scale[i]`."""
        square = scale.double() ** 2
        return KnownAnswer(
            grad_sq_norm=float((square * self.mean**2).sum()), noise_trace=float((square * self.variance).sum())
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem with parameters that stay where they are.

    Attributes:
        name: as the result names it.
        model: samples → loss of each sample.
        draw: (generator, shape) → samples of that shape, its last dimension the samples of one global batch; each
            sample may have further dimensions.
        truth: what a measurement should find.
        micro_batch_size: in samples.
        num_steps: steps of one repetition.
        population: samples in the data set where a global batch is drawn from it without replacement.
        elements: the truth in every element, where somebody asked for it.
    """

    name: str
    model: nn.Module
    draw: Callable[[Generator, tuple[int, ...]], Tensor]
    truth: KnownAnswer
    micro_batch_size: int
    num_steps: int
    population: int | None = None
    elements: Callable[[], Elements] | None = None


class VectorLoss(nn.Module):
    """A loss per sample that is a function of one vector of parameters.

    Args:
        theta: the parameters, shape (dimension,).
        loss: (theta, samples of shape (samples, dimension)) → shape (samples,).
    """

    def __init__(self, theta: Tensor, *, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta)
        self._loss = loss

    def forward(self, samples: Tensor) -> Tensor:
        """Loss of each sample."""
        return self._loss(self.theta, samples)


class IndexedLoss(nn.Module):
    """Cross-entropy per sample of a classifier on a data set that is addressed by index.

    Args:
        classifier: pixels → logits.
        pixels: shape (samples, pixels).
        classes: shape (samples,).
    """

    def __init__(self, classifier: nn.Module, *, pixels: Tensor, classes: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self._pixels = pixels
        self._classes = classes

    def forward(self, indices: Tensor) -> Tensor:
        """Loss of each sample of `indices`, shape (samples,)."""
        logits = self.classifier(self._pixels[indices])
        return functional.cross_entropy(logits, self._classes[indices], reduction="none")


class Copies(nn.Module):
    """Independent copies of one model, each with parameters of its own and samples of its own, run side by side.

    Args:
        model: samples → loss of each sample.
        num: how many.
    """

    def __init__(self, model: nn.Module, *, num: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(model) for _ in range(num))

    def forward(self, samples: Tensor) -> Tensor:
        """Sum of all copies' losses, shape (samples,), of samples of shape (samples, copies, …)."""
        owned = [dict(own.named_parameters()) for own in self.copies]
        stacked = {name: torch.stack([parameters[name] for parameters in owned]) for name in owned[0]}

        def losses(parameters: dict[str, Tensor], seen: Tensor) -> Tensor:
            found: Tensor = functional_call(self.copies[0], parameters, (seen,))
            return found.float()

        return torch.vmap(losses, in_dims=(0, 1))(stacked, samples).sum(0)


class Mixture(nn.Module):
    """Copies of several models as the parts of one, so that one step is a repetition of each problem in every copy.

    Args:
        problems: unlike ones.
        num_copies: of each.
    """

    def __init__(self, problems: Sequence[Problem], *, num_copies: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Copies(problem.model, num=num_copies) for problem in problems)

    def copies(self) -> list[list[nn.Module]]:
        """Return the copies of each problem's model."""
        return [list(part.copies) for part in self.parts if isinstance(part, Copies)]

    def forward(self, *samples: Tensor) -> Tensor:
        """Sum of all losses, shape (samples,), of one tensor for each problem, shape (samples, copies, …)."""
        return torch.stack([part(seen) for part, seen in zip(self.parts, samples, strict=True)]).sum(0)


def coin() -> Problem:
    """Problem 1: a sample's gradient is 1 or 3."""

    def throw(generator: Generator, shape: tuple[int, ...]) -> Tensor:
        return 1 + 2 * torch.randint(0, 2, (*shape, COPIES), generator=generator).float()

    return Problem(
        name="coin",
        model=VectorLoss(torch.zeros(COPIES), loss=_linear),
        draw=throw,
        truth=KnownAnswer(noise_trace=1.0 * COPIES, grad_sq_norm=4.0 * COPIES),
        micro_batch_size=1,
        num_steps=40,
    )


def quadratic() -> Problem:
    """Problem 2: ½(θ−c)ᵀH(θ−c) with H = diag(4, 1, ½, 0.1), Cov(c) = diag(1 … 4), θ − c̄ = (1, −1, 2, 3)."""
    curvature = torch.tensor([4.0, 1.0, 0.5, 0.1]).repeat(COPIES)
    theta = torch.tensor([1.0, -1.0, 2.0, 3.0]).repeat(COPIES)
    variance = torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(COPIES)
    return Problem(
        name="quadratic",
        model=VectorLoss(theta, loss=lambda theta, centres: 0.5 * (curvature * (theta - centres) ** 2).sum(-1)),
        draw=_normal(std=variance.sqrt()),
        truth=KnownAnswer(noise_trace=18.79 * COPIES, grad_sq_norm=18.09 * COPIES),
        micro_batch_size=1,
        num_steps=40,
        elements=lambda: Elements(mean=(curvature * theta).double(), variance=(curvature**2 * variance).double()),
    )


def linear() -> Problem:
    """Problem 3: x·w with x ~ N(μ, I) in 50 dimensions, |μ|² = 2."""
    return _isotropic(name="linear", dimension=50, std=1.0, grad_sq_norm=2.0, micro_batch_size=16, num_steps=40)


def variances() -> Problem:
    """Problem 8: 20 dimensions, σ = 1.5, |G|² = 1.8, micro-batches of two; its scatter by step is known too."""
    return _isotropic(
        name="variances",
        dimension=20 * COPIES,
        std=1.5,
        grad_sq_norm=1.8 * COPIES,
        micro_batch_size=2,
        num_steps=40,
    )


def clamping() -> Problem:
    """Problem 9: φ = 25 seen in micro-batches of one sample, so that single steps often have a negative |G|²."""
    return _isotropic(name="clamping", dimension=128, std=1.0, grad_sq_norm=128 / 25, micro_batch_size=1, num_steps=150)


def digits_with_replacement() -> Problem:
    """Problem 11: the MLP on all training digits at its initial parameters, truth from every sample's gradient."""
    model, num_samples = _digits(None)
    exact = _exact(model, num_samples)
    return Problem(
        name="digits",
        model=model,
        draw=lambda generator, shape: torch.randint(0, num_samples, shape, generator=generator),
        # Independent draws have the covariance over the set itself, which divides by D and not by D − 1.
        truth=KnownAnswer(
            noise_trace=exact.noise_trace * (num_samples - 1) / num_samples, grad_sq_norm=exact.grad_sq_norm
        ),
        micro_batch_size=32,
        num_steps=100,
        elements=functools.partial(_elements_of_all, model, num_samples),
    )


def digits_without_replacement() -> Problem:
    """Problem 11 on 128 digits of which a step sees each once at most, as in an epoch of small data."""
    model, num_samples = _digits(128)

    def deal(generator: Generator, shape: tuple[int, ...]) -> Tensor:
        keys = torch.rand((*shape[:-1], num_samples), generator=generator)
        return keys.argsort(-1)[..., : shape[-1]]

    return Problem(
        name="digits dealt",
        model=model,
        draw=deal,
        truth=_exact(model, num_samples),
        micro_batch_size=16,
        num_steps=40,
        population=num_samples,
    )


PROBLEMS: tuple[Callable[[], Problem], ...] = (
    coin,
    quadratic,
    linear,
    variances,
    clamping,
    digits_with_replacement,
    digits_without_replacement,
)


def _linear(theta: Tensor, samples: Tensor) -> Tensor:
    return samples @ theta


def _normal(*, std: Tensor, mean: Tensor | float = 0.0) -> Callable[[Generator, tuple[int, ...]], Tensor]:
    return lambda generator, shape: mean + std * torch.randn((*shape, len(std)), generator=generator)


def _isotropic(
    *, name: str, dimension: int, std: float, grad_sq_norm: float, micro_batch_size: int, num_steps: int
) -> Problem:
    """A linear loss, whose gradient is the sample: mean |G| spread evenly, noise the same in all directions."""
    mean = torch.full((dimension,), (grad_sq_norm / dimension) ** 0.5)
    deviation = torch.full((dimension,), std)
    return Problem(
        name=name,
        model=VectorLoss(torch.zeros(dimension), loss=_linear),
        draw=_normal(std=deviation, mean=mean),
        truth=KnownAnswer(noise_trace=dimension * std**2, grad_sq_norm=grad_sq_norm),
        micro_batch_size=micro_batch_size,
        num_steps=num_steps,
        elements=lambda: Elements(mean=mean.double(), variance=deviation.double() ** 2),
    )


def _digits(num_samples: int | None) -> tuple[IndexedLoss, int]:
    torch.manual_seed(0)
    task = digits()
    assert isinstance(task.train_data, TensorDataset)
    pixels, classes = (tensor[:num_samples] for tensor in task.train_data.tensors)
    return IndexedLoss(task.model, pixels=pixels, classes=classes), len(classes)


def _exact(model: nn.Module, num_samples: int) -> KnownAnswer:
    return exact_noise(model, lambda module, indices: module(indices).mean(), range(num_samples))


def _elements_of_all(model: nn.Module, num_samples: int) -> Elements:
    """Return the moments over independent draws from a finite set, from the gradient of each sample in it."""
    parameters = list(model.parameters())
    gradients = []
    for index in range(num_samples):
        parts = torch.autograd.grad(model(torch.tensor([index])).mean(), parameters)
        gradients.append(torch.cat([part.flatten() for part in parts]).double())
    variance, mean = torch.var_mean(torch.stack(gradients), 0, correction=0)
    return Elements(mean=mean, variance=variance)
