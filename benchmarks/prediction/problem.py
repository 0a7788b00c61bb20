"""What the atlas needs to know of a problem, and how many steps one run of it takes; no problem lives here."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dptrain.noise import SquaredNorms

Array = NDArray[np.float64]

DIVERGED = 100.0
"""A run is given up where its loss is so many times that of its start; the best rates may well overshoot at first."""
_LOOKS = 1.03
"""The loss is looked at in each of the first steps, later each time the run is so many times as long."""


class Learner(Protocol):
    """One run of a problem: a model on its way."""

    def step(self) -> SquaredNorms | None:
        """Take one optimizer step; return the squared norms that were seen, where noise is to be seen."""

    def loss(self) -> float:
        """Return what is compared with the targets: positive, the smaller the better."""


# eq=False: a problem is equal to itself alone, so that what it has loaded can be kept by it.
@dataclass(frozen=True, kw_only=True, eq=False)
class Problem(ABC):
    """A problem with its targets, and the grid of batches on which it is tried.

    Attributes:
        name: as the result names it.
        kind: "quadratic", "supervised" or "policy".
        unit: what the batch counts.
        optimizer: which one, in words.
        targets: losses to be reached, the early and the late one.
        batch_sizes: powers of two, ascending.
        first_rate: a learning rate to begin the search with, at the largest batch.
        max_steps: after which a run at the largest batch is given up; the limits of the smaller batches follow.
        num_seeds: runs of each variant.
        num_measured: runs over which the noise scale is averaged, with seeds of their own.
        grain: the smallest batch there is, of which larger ones are multiples.
    """

    name: str
    kind: str
    unit: str = "samples"
    optimizer: str
    targets: tuple[float, float]
    batch_sizes: tuple[int, ...]
    first_rate: float
    max_steps: int
    num_seeds: int = 3
    num_measured: int = 4
    grain: int = 1

    @abstractmethod
    def learner(self, *, batch_size: int, rate: float, seed: int, num_parts: int | None = None) -> Learner:
        """Return a fresh run.

        Args:
            batch_size: of each step.
            rate: learning rate.
            seed: of the initial parameters and of the samples.
            num_parts: micro-batches into which each step's batch is cut to see its noise; None to see nothing.
        """

    def crossings(self, *, batch_size: int, rates: Sequence[float], limits: Sequence[int]) -> Array:
        """Return after how many steps each target was reached, shape (rates, seeds, targets); infinite where not.

        A target that one seed failed is not tried with the next, for the learning rate is out of the question.

        Args:
            batch_size: of each step.
            rates: learning rates.
            limits: steps after which a run to each target is given up.
        """
        reached = np.full((len(rates), self.num_seeds, len(self.targets)), math.inf)
        for variant, rate in enumerate(rates):
            hopeful = len(self.targets)
            for seed in range(self.num_seeds):
                learner = self.learner(batch_size=batch_size, rate=rate, seed=seed)
                steps = first_crossings(learner, targets=self.targets[:hopeful], limit=limits[hopeful - 1])
                reached[variant, seed, : len(steps)] = steps
                hopeful = len(steps)
                if not hopeful:
                    break
        return reached


def first_crossings(learner: Learner, *, targets: Sequence[float], limit: int) -> list[float]:
    """Train until the last target is reached, and return the steps that each one took.

    A run that diverges or takes more than `limit` steps is given up; the targets that it did not reach are left out.
    Between two looks at the loss, its logarithm is taken to be linear in the steps.
    """
    reached: list[float] = []
    start = last = learner.loss()
    last_step, next_look = 0, 1
    for step in range(1, limit + 1):
        learner.step()
        if step < next_look:
            continue
        loss = learner.loss()
        if not loss <= DIVERGED * start:
            break
        while len(reached) < len(targets) and loss <= targets[len(reached)]:
            share = math.log(last / targets[len(reached)]) / math.log(last / loss)
            reached.append(last_step + share * (step - last_step))
        if len(reached) == len(targets):
            break
        last, last_step, next_look = loss, step, max(step + 1, int(step * _LOOKS))
    return reached
