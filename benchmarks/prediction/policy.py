"""Policy gradient on CartPole, its batch counted in frames; the environment is gymnasium's, which is optional."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import dptrain
from benchmarks.prediction.networks import make_optimizer, read_norms
from benchmarks.prediction.problem import Problem
from dptrain.noise import SquaredNorms

_FRAMES = 64
"""Frames that each pole contributes to a step; a batch is that many times as many poles."""
_DISCOUNT = 0.98
_WARM_UP = 64
"""Frames of random play before the first step, so that the poles do not all stand at the beginning of an episode."""
_WIDTH = 32
_NUM_JUDGED = 64
_LONGEST = 500
_HELD = 0.25
"""The part of the run at whose end a target must have been held."""


def has_gymnasium() -> bool:
    """Say whether the package that has the environment is installed."""
    return importlib.util.find_spec("gymnasium") is not None


@dataclass(frozen=True, kw_only=True, eq=False)
class CartPole(Problem):
    """Policy gradient on CartPole-v1: the loss is 500 over the mean length of an episode, cut at 500."""

    kind: str = "policy"
    unit: str = "frames"
    optimizer: str = "Adam"
    grain: int = _FRAMES

    def learner(self, *, batch_size: int, rate: float, seed: int, num_parts: int | None = None) -> CartPoleLearner:
        """Return a fresh run."""
        return CartPoleLearner(
            num_poles=batch_size // _FRAMES, rate=rate, optimizer=self.optimizer, seed=seed, num_parts=num_parts
        )


class CartPoleLearner:
    """One run of policy gradient in its plainest form: a frame returns −0.98^k where the pole falls k frames on.

    No critic learns beside it, whose own noise and stability would have a say in how large a batch is of use.
    """

    def __init__(self, *, num_poles: int, rate: float, optimizer: str, seed: int, num_parts: int | None) -> None:
        torch.manual_seed(seed)
        self._policy = nn.Sequential(nn.Linear(4, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, 2))
        self._optimizer = make_optimizer(optimizer, self._policy, rate=rate)
        self._generator = torch.Generator().manual_seed(seed)
        self._num_parts = num_parts or 1
        self._meter = dptrain.attach(self._policy, every=1) if num_parts else None
        self._poles = _poles(num_poles)
        self._judged = _poles(_NUM_JUDGED)
        self._seen = torch.as_tensor(self._poles.reset(seed=seed)[0])
        self._begins = torch.zeros(num_poles, dtype=torch.bool)
        self._num_steps = 0
        self._lengths: list[tuple[int, float]] = []
        for _ in range(_WARM_UP):
            self._act(torch.zeros(num_poles, 2))

    def step(self) -> SquaredNorms | None:
        """Play some frames with the present policy, and take a step along the gradient of their returns."""
        frames = self._play()
        self._optimizer.zero_grad()
        for poles in torch.arange(self._poles.num_envs).chunk(self._num_parts):
            part = {name: values[:, poles] for name, values in frames.items()}
            (self._loss(**part) / self._num_parts).backward()  # type: ignore[no-untyped-call] # torch's own
        seen = read_norms(self._meter)
        self._optimizer.step()
        self._num_steps += 1
        return seen

    def loss(self) -> float:
        """Return 500 over the mean length of an episode, in the mean over the looks at the last quarter of the run.

        A single look would reward luck: policies that jump about at random come by a good one soon, and leave it again.
        """
        self._lengths.append((self._num_steps, self._length()))
        recent = [length for step, length in self._lengths if step >= (1 - _HELD) * self._num_steps]
        return _LONGEST * len(recent) / sum(recent)

    def _length(self) -> float:
        """Return the mean length of 64 episodes, each cut at 500 frames, by numpy: so small a network is faster so."""
        first, bias, last, last_bias = (p.detach().numpy() for p in self._policy.parameters())
        generator = np.random.default_rng(0)
        seen, _ = self._judged.reset(seed=0)
        standing = np.ones(_NUM_JUDGED, dtype=bool)
        frames = 0
        while standing.any() and frames < _LONGEST * _NUM_JUDGED:
            frames += standing.sum()
            logits = np.tanh(seen @ first.T + bias) @ last.T + last_bias
            right = generator.random(_NUM_JUDGED) < 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
            seen, _, fallen, _, _ = self._judged.step(right.astype(np.int64))
            standing &= ~fallen
        return float(frames / _NUM_JUDGED)

    def _act(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Act by `logits`; return actions, rewards, and whether each episode ended."""
        actions = _draw(logits, self._generator)
        found, rewards, fallen, cut, _ = self._poles.step(actions.numpy())
        self._seen = torch.as_tensor(found)
        ended = torch.as_tensor(fallen | cut)
        self._begins = ended
        return actions, torch.as_tensor(np.asarray(rewards, dtype=np.float32)), ended

    @torch.no_grad()
    def _play(self) -> dict[str, Tensor]:
        """Return the frames with their returns, each of shape (frames, poles, …)."""
        rows = []
        for _ in range(_FRAMES):
            # After the end of an episode, one frame goes by in which the pole is put up and no action counts.
            seen, idle = self._seen, self._begins
            actions, rewards, ended = self._act(self._policy(seen))
            rows.append((seen, actions, rewards, ended, idle))
        seen, actions, rewards, ended, idle = (torch.stack(column) for column in zip(*rows, strict=True))
        following = torch.zeros_like(rewards[0])
        returns = torch.empty_like(rewards)
        for frame in reversed(range(_FRAMES)):
            following = rewards[frame] + _DISCOUNT * following * ~ended[frame]
            returns[frame] = following
        return {"seen": seen, "actions": actions, "returns": returns, "counts": ~idle}

    def _loss(self, *, seen: Tensor, actions: Tensor, returns: Tensor, counts: Tensor) -> Tensor:
        surprise = functional.cross_entropy(self._policy(seen.flatten(0, 1)), actions.flatten(), reduction="none")
        loss: Tensor = (surprise * returns.flatten() * counts.flatten()).mean()
        return loss


def _poles(num: int) -> Any:  # noqa: ANN401 - an environment of a package that need not be there
    import gymnasium

    # This reward is −1 when a pole falls and else 0: returns of order one need no scaling.
    return gymnasium.make_vec(
        "CartPole-v1", num_envs=num, vectorization_mode="vector_entry_point", sutton_barto_reward=True
    )


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the action 0 or 1 of each row."""
    return (torch.rand(len(logits), generator=generator) < logits.softmax(-1)[:, 1]).long()
