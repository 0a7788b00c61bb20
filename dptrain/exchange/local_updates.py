"""Parameters every H steps through an outer optimizer: local SGD, and DiLoCo's Nesterov."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.errors import ConfigError
from dptrain.exchange.base import Exchange, all_reduce_bytes, num_bytes

Outer = Literal["average", "nesterov"]


class LocalUpdates(Exchange):
    """Replicas step by themselves, and every H steps the outer optimizer moves all to common parameters.

    `average` takes the mean of the replicas' parameters (local SGD, Stich 2019, arXiv 1805.09767); with H = 1 and plain
    SGD that is the all-reduced step. `nesterov` treats the mean change as a gradient of the parameters at the latest
    exchange (DiLoCo, Douillard et al. 2023, arXiv 2311.08105; MuLoCo has Muon inside). The state of the inner
    optimizer stays local.

    Args:
        every: H, optimizer steps from one exchange to the next, at least 1.
        outer: which outer optimizer.
        outer_learning_rate: of nesterov; 0.7 in DiLoCo.
        outer_momentum: of nesterov; 0.9 in DiLoCo.
        group: process group; None for the default one.

    Raises:
        ConfigError: where a setting is out of range.
    """

    name: ClassVar[str] = "local_updates"
    parameters_are_equal: ClassVar[bool] = False
    no_noise_scale: ClassVar[str | None] = (
        "replicas have parameters of their own between two exchanges, so there is no gradient of the global batch: "
        "measure with exchange.kind=all_reduce, or read the spread of the replicas"
    )

    def __init__(
        self,
        every: int = 8,
        *,
        outer: Outer = "average",
        outer_learning_rate: float = 0.7,
        outer_momentum: float = 0.9,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group=group)
        if every < 1:
            raise ConfigError(f"replicas exchange every so many steps, at least 1, got {every}")
        if outer not in ("average", "nesterov"):
            raise ConfigError(f"the outer optimizer must be average or nesterov, got {outer!r}")
        if not (outer_learning_rate > 0 and 0 <= outer_momentum < 1):
            raise ConfigError(
                f"the outer learning rate must be positive and its momentum in [0, 1), got {outer_learning_rate} and "
                f"{outer_momentum}"
            )
        self.every = every
        self._outer = outer
        self._rate = outer_learning_rate
        self._momentum = outer_momentum
        self._steps = 0
        self._anchors: list[Tensor] = []
        self._velocities: list[Tensor] = []
        self.spread: Tensor | None = None
        """Mean squared distance of the replicas from their mean at the latest exchange, on the device."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model itself, with the parameters of rank 0."""
        self._begin_equal(model)
        if self._outer == "nesterov":
            self._anchors = [parameter.detach().clone() for parameter in self._trained()]
            self._velocities = [torch.zeros_like(anchor) for anchor in self._anchors]
        return model

    def updated(self) -> None:
        """Count a step; exchange parameters after every H-th."""
        self._steps += 1
        if self._steps % self.every == 0:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        trained = self._trained()
        spread = torch.zeros((), dtype=torch.float64, device=trained[0].device)
        for index, parameter in enumerate(trained):
            mean = self._mean(parameter.detach().clone())
            spread += (parameter - mean).double().square().sum()
            parameter.copy_(mean if self._outer == "average" else self._nesterov(index, mean))
        self.spread = self._mean(spread)

    def _nesterov(self, index: int, mean: Tensor) -> Tensor:
        anchor, velocity = self._anchors[index], self._velocities[index]
        gradient = anchor - mean
        velocity.mul_(self._momentum).add_(gradient)
        return anchor.sub_(self._rate * (gradient + self._momentum * velocity))

    def bytes_per_step(self) -> float:
        """Return the bytes of a ring all-reduce of the parameters, over H steps."""
        return all_reduce_bytes(num_bytes(self._trained()), num_replicas=self.num_replicas) / self.every

    def state_dict(self) -> dict[str, Any]:
        """Return the steps so far, and nesterov's anchors and velocities in the order of the parameters."""
        return {
            "steps": self._steps,
            "anchors": [anchor.clone() for anchor in self._anchors],
            "velocities": [velocity.clone() for velocity in self._velocities],
        }

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._steps = int(record["steps"])
        for mine, theirs in zip(
            (*self._anchors, *self._velocities), (*record["anchors"], *record["velocities"]), strict=True
        ):
            mine.copy_(theirs)
