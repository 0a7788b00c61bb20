"""Problems whose gradient noise is known exactly, by formula or from every sample's gradient; none is estimated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from dptrain.errors import ConfigError, TaskError
from dptrain.tasks.base import Batch, LossFunction, Suggestion, Task, split_loss

_NUM_SAMPLES = 1 << 20
_NUM_HELD_OUT = 1024


@dataclass(frozen=True, kw_only=True)
class KnownAnswer:
    """What an estimator of the noise should find at one value of the parameters.

    Attributes:
        grad_sq_norm: |G|², squared norm of the mean gradient.
        noise_trace: tr(Σ), trace of the covariance of the per-sample gradient.
    """

    grad_sq_norm: float
    noise_trace: float

    @property
    def simple_noise_scale(self) -> float:
        """tr(Σ)/|G|², in samples; infinite where the mean gradient vanishes."""
        return self.noise_trace / self.grad_sq_norm if self.grad_sq_norm else math.inf


class GaussianSamples(Dataset[Tensor]):
    """Independent Gaussian vectors, each a function of (seed, index): any number of them, none stored.

    Component j of sample i is `mean[j] + std[j]·z`, z standard normal, made from a hash of (seed, i, j).

    Args:
        mean: shape (dimension,).
        std: standard deviation of each component, shape (dimension,).
        num_samples: length.
        seed: different seeds give independent samples.
    """

    def __init__(self, *, mean: Tensor, std: Tensor, num_samples: int, seed: int) -> None:
        self.mean = mean
        self.std = std
        self.num_samples = num_samples
        self._key = _mix(torch.tensor(seed, dtype=torch.int64))

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Tensor:
        return self.draw(torch.tensor([index]))[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """All samples of a micro-batch at once, where a DataLoader asks for them so."""
        return list(self.draw(torch.as_tensor(indices, dtype=torch.int64)))

    def draw(self, indices: Tensor) -> Tensor:
        """The samples of `indices`, shape (number of indices,), as float32 of shape (number of indices, dimension).

        Raises:
            IndexError: where an index is outside 0 … num_samples − 1.
        """
        if ((indices < 0) | (indices >= self.num_samples)).any():
            raise IndexError(f"samples are numbered 0 … {self.num_samples - 1}, got {indices.tolist()}")
        counters = torch.arange(1, len(self.mean) + 1) * _GOLDEN
        bits = _mix(_mix(indices + self._key)[:, None] + counters)
        # 52 bits and a half: exact in float64 and never 0 or 1, where the normal quantile is infinite.
        uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52
        normal: Tensor = torch.special.ndtri(uniform)
        return self.mean + self.std * normal.float()


# The splitmix64 generator (Steele, Lea and Flood, OOPSLA 2014): its increment and its output function, on integers
# that wrap at 64 bits. torch has no shifts for uint64, so these are int64, with the sign bit masked after a shift.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    bits = (bits ^ _shift_right(bits, 27)) * (0x94D049BB133111EB - (1 << 64))
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, places: int) -> Tensor:
    return (bits >> places) & ((1 << (64 - places)) - 1)


class ShiftedQuadratic(nn.Module):
    """Losses ½(θ−c)ᵀH(θ−c) of samples c ~ N(0, C), with diagonal H and C; θ is the parameter.

    Args:
        theta: initial θ, shape (dimension,).
        curvature: diagonal of H, shape (dimension,).
        covariance: diagonal of C, shape (dimension,).
    """

    curvature: Tensor
    covariance: Tensor

    def __init__(self, *, theta: Tensor, curvature: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())
        self.register_buffer("curvature", curvature)
        self.register_buffer("covariance", covariance)

    def forward(self, centres: Tensor) -> Tensor:
        """Loss of each sample, shape (samples,), of centres of shape (samples, dimension)."""
        return 0.5 * (self.curvature * (self.theta - centres) ** 2).sum(-1)

    def known_answer(self) -> KnownAnswer:
        """|G|² = |Hθ|² and tr(Σ) = tr(HCH), over the distribution of c, at the present θ."""
        curvature = self.curvature.double()
        return KnownAnswer(
            grad_sq_norm=float((curvature * self.theta.detach().double()).square().sum()),
            noise_trace=float((curvature.square() * self.covariance.double()).sum()),
        )


class LinearLoss(nn.Module):
    """Losses x·w of samples x ~ N(μ, I): the gradient of a sample is the sample, wherever w is.

    Args:
        mean: μ, shape (dimension,).
    """

    mean: Tensor

    def __init__(self, *, mean: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(mean))
        self.register_buffer("mean", mean)

    def forward(self, samples: Tensor) -> Tensor:
        """Loss of each sample, shape (samples,), of samples of shape (samples, dimension)."""
        return samples @ self.weight

    def known_answer(self) -> KnownAnswer:
        """|G|² = |μ|² and tr(Σ) = dimension, over the distribution of x."""
        mean = self.mean.double()
        return KnownAnswer(grad_sq_norm=float(mean.square().sum()), noise_trace=float(mean.numel()))


def quadratic(*, num_samples: int = _NUM_SAMPLES, seed: int = 0) -> Task:
    """A shifted quadratic in four dimensions: at the start tr(Σ) = 18.79, |G|² = 18.09, and |G|² falls in training.

    Args:
        num_samples: length of the training data, at least 2.
        seed: of the samples; the held-out samples are others of the same distribution.

    Raises:
        ConfigError: where `num_samples` is below 2.
    """
    covariance = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return _known_task(
        name="quadratic",
        model=ShiftedQuadratic(
            theta=torch.tensor([1.0, -1.0, 2.0, 3.0]),
            curvature=torch.tensor([4.0, 1.0, 0.5, 0.1]),
            covariance=covariance,
        ),
        samples=_gaussian(mean=torch.zeros(4), std=covariance.sqrt(), num_samples=num_samples, seed=seed),
    )


def linear(*, dimension: int = 50, grad_sq_norm: float = 2.0, num_samples: int = _NUM_SAMPLES, seed: int = 0) -> Task:
    """A linear loss: tr(Σ) = `dimension` and |G|² = `grad_sq_norm` for ever, whatever the optimizer does.

    The loss has no minimum; it falls as far as training goes.

    Args:
        dimension: number of parameters, at least 1.
        grad_sq_norm: |μ|², spread evenly over the components of μ; at least 0.
        num_samples: length of the training data, at least 2.
        seed: of the samples; the held-out samples are others of the same distribution.

    Raises:
        ConfigError: where a value is below its bound.
    """
    if dimension < 1 or grad_sq_norm < 0:
        raise ConfigError(
            f"linear needs dimension of at least 1 and grad_sq_norm of at least 0, got {dimension} and {grad_sq_norm}"
        )
    mean = torch.full((dimension,), math.sqrt(grad_sq_norm / dimension))
    return _known_task(
        name="linear",
        model=LinearLoss(mean=mean),
        samples=_gaussian(mean=mean, std=torch.ones(dimension), num_samples=num_samples, seed=seed),
    )


def known_answer(task: Task) -> KnownAnswer:
    """The exact answer of a `quadratic` or `linear` task at the present parameters of its model.

    It is the answer of the **distribution** that samples are drawn from. The D samples of a data set have a mean and a
    covariance of their own, off by about 1/√D; `exact_noise` gives those.

    Raises:
        TaskError: where the task is another one.
    """
    if not isinstance(task.model, ShiftedQuadratic | LinearLoss):
        raise TaskError(f"task {task.name} has no answer in closed form; exact_noise computes that of any finite data")
    return task.model.known_answer()


def exact_noise(
    model: nn.Module,
    loss: LossFunction,
    samples: Dataset[Any] | Sequence[Any],
    *,
    collate: Callable[[list[Any]], Batch] = default_collate,
) -> KnownAnswer:
    """|G|² and tr(Σ) over a finite set of D samples, from the gradient of every one of them.

    One forward–backward per sample; sums in float64 by Welford's updates, so that nothing cancels. tr(Σ) divides by
    D−1. An estimator that draws from these D samples **without** replacement finds exactly this tr(Σ), but
    |G|² − tr(Σ)/D in the mean, because samples that exclude one another are slightly anticorrelated: compare with that
    where D is small.

    Args:
        model: at the parameters in question, in the mode (train or eval) in question. Its loss must be a mean over
            samples that do not see one another, so batch norm has no answer in train mode.
        loss: as of a task; it is called with one sample at a time.
        samples: at least 2.
        collate: a list of one sample → its micro-batch.

    Raises:
        TaskError: where there are fewer than two samples.
    """
    count = 0
    mean, scatter = torch.zeros((), dtype=torch.float64), 0.0
    for count, gradient in enumerate(_gradients(model, loss, samples, collate), start=1):
        deviation = gradient - mean
        mean = mean + deviation / count
        scatter += float(deviation @ (gradient - mean))
    if count < 2:  # noqa: PLR2004 - a covariance needs two
        raise TaskError(f"a covariance needs at least two samples, got {count}")
    return KnownAnswer(grad_sq_norm=float(mean @ mean), noise_trace=scatter / (count - 1))


def _gradients(
    model: nn.Module,
    loss: LossFunction,
    samples: Dataset[Any] | Sequence[Any],
    collate: Callable[[list[Any]], Batch],
) -> Iterator[Tensor]:
    """The gradient of each sample, flat, in float64; an unused parameter has gradient zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for index in range(len(samples)):  # type: ignore[arg-type] # torch's Dataset declares no length
        value, _ = split_loss(loss(model, collate([samples[index]])))
        gradients = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        yield torch.cat([g.detach().flatten().double() for g in gradients])


def _gaussian(*, mean: Tensor, std: Tensor, num_samples: int, seed: int) -> tuple[GaussianSamples, GaussianSamples]:
    if num_samples < 2:  # noqa: PLR2004 - noise needs two samples to be seen
        raise ConfigError(f"num_samples must be at least 2, got {num_samples}")
    train = GaussianSamples(mean=mean, std=std, num_samples=num_samples, seed=2 * seed)
    held_out = GaussianSamples(mean=mean, std=std, num_samples=_NUM_HELD_OUT, seed=2 * seed + 1)
    return train, held_out


def _known_task(*, name: str, model: nn.Module, samples: tuple[GaussianSamples, GaussianSamples]) -> Task:
    train, held_out = samples
    return Task(
        name=name,
        model=model,
        train_data=train,
        eval_data=held_out,
        loss=_mean_loss,
        suggestion=Suggestion(
            learning_rate=0.01,
            global_batch_size=16,
            micro_batch_size=4,
            max_samples=40_000,
            eval_every_samples=4_000,
        ),
    )


def _mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    mean: Tensor = model(batch).mean()
    return mean
