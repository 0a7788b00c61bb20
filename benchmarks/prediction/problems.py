"""The problems of the atlas with their targets and grids of batches; how they are trained stands elsewhere."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.prediction.networks import Network
from benchmarks.prediction.policy import CartPole, has_gymnasium
from benchmarks.prediction.problem import Array, Problem
from benchmarks.prediction.quadratics import Quadratic

_SHORT = {"context": 32, "width": 32}


def atlas(*, quick: bool) -> list[Problem]:
    """Return the problems, those that take longest first; with `quick` a few small ones."""
    if quick:
        small = [dataclasses.replace(_softmax(), targets=(0.9, 0.4)), *_quadratics()[:3]]
        return [dataclasses.replace(problem, num_seeds=2, num_measured=2) for problem in small]
    policy = [_cart_pole()] if has_gymnasium() else []
    return [*policy, *_languages(), *_pictures(), _softmax(), *_quadratics()]


def absent() -> list[str]:
    """Return the problems that cannot be charted here, for want of a package."""
    return [] if has_gymnasium() else [f"{_cart_pole().name} (gymnasium is not installed)"]


def powers(first: int, last: int, *, ratio: int = 4) -> tuple[int, ...]:
    """Return first, first·ratio, … up to last."""
    return tuple(first * ratio**exponent for exponent in range(1 + round(np.log(last / first) / np.log(ratio))))


def _cart_pole() -> Problem:
    """Its targets are mean lengths of 150 and 400 of 500 frames; random play stands for some 20."""
    return CartPole(
        name="CartPole, policy gradient",
        targets=(500 / 150, 500 / 400),
        batch_sizes=powers(64, 1 << 16),
        first_rate=0.05,
        max_steps=400,
        num_seeds=4,
    )


def _languages() -> list[Problem]:
    """Targets in nats per byte; a guess has ln 256 = 5.5, and the frequencies of single bytes give about 3.4."""
    return [
        Network(
            name=f"pysource, {model}",
            task="pysource",
            options=_SHORT | options,
            unit="sequences",
            optimizer="Adam",
            targets=(2.9, 2.3),
            batch_sizes=(1, 2, 4, 16, 64, 256),
            first_rate=0.02,
            max_steps=400,
            num_seeds=num_seeds,
            num_eval=128,
        )
        for model, num_seeds, options in (("transformer", 2, {}), ("LSTM", 3, {"model": "lstm", "depth": 1}))
    ]


def _pictures() -> list[Problem]:
    """Targets in nats for the classifiers, where a guess has ln 10 = 2.3; in squared error for the other two."""
    return [
        Network(
            name="digits, CNN",
            task="digits",
            options={"model": "cnn"},
            optimizer="SGD",
            targets=(0.7, 0.15),
            batch_sizes=powers(1, 1024),
            first_rate=0.3,
            max_steps=2000,
        ),
        Network(
            name="patches, denoiser",
            task="patches",
            optimizer="Adam",
            targets=(0.012, 0.005),
            batch_sizes=(1, 2, 4, 8, 16, 64, 256),
            first_rate=0.01,
            max_steps=1000,
        ),
        Network(
            name="digits, autoencoder",
            task="digits",
            options={"model": "autoencoder"},
            optimizer="Adam",
            targets=(0.06, 0.025),
            batch_sizes=(1, 2, 4, 8, 16, 64, 256),
            first_rate=0.01,
            max_steps=1000,
            num_seeds=4,
        ),
        Network(
            name="digits, MLP",
            task="digits",
            options={"model": "mlp"},
            optimizer="SGD",
            targets=(0.7, 0.15),
            batch_sizes=powers(1, 1024),
            first_rate=0.3,
            max_steps=2000,
        ),
    ]


def _softmax() -> Problem:
    return Network(
        name="digits, softmax",
        task="digits",
        options={"model": "softmax"},
        optimizer="SGD",
        targets=(0.7, 0.2),
        batch_sizes=powers(1, 1024),
        first_rate=3.0,
        max_steps=2000,
    )


def _quadratics() -> list[Problem]:
    """Four shapes of spectrum and noise; the height of the noise is free, for it moves both numbers by one factor."""
    order = np.arange(1, 65, dtype=np.float64)
    two, falling, steep = np.repeat([1.0, 0.02], 32), 1 / order, order**-1.5
    white = np.ones(64)
    return [
        _quadratic("two scales", two, noise=two, first_scale=1.0, smallest=1, late=0.03),
        _quadratic("1/i, noise alike", falling, noise=falling, first_scale=300.0, smallest=8),
        _quadratic("1/i, white noise", falling, noise=white, first_scale=1.5e3, smallest=64),
        _quadratic("steep, white noise", steep, noise=white, first_scale=1e5, smallest=2048),
    ]


def _quadratic(
    name: str, curvature: Array, *, noise: Array, first_scale: float, smallest: int, late: float = 0.1
) -> Problem:
    """Return a quadratic whose noise has the shape of `noise`, and whose noise scale starts at `first_scale`."""
    return Quadratic(
        name=f"quadratic, {name}",
        targets=(0.3, late),
        batch_sizes=powers(smallest, smallest << 10),
        curvature=curvature,
        covariance=first_scale * curvature.sum() * noise / noise.sum(),
    )
