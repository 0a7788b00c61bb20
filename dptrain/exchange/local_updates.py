"""Parameters every H steps through an outer optimizer: local SGD, and DiLoCo's Nesterov."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.errors import ConfigError
from dptrain.exchange.base import Exchange, State, all_reduce_bytes, mean_of, num_bytes

Outer = Literal["average", "nesterov"]


@dataclass(kw_only=True)
class _UnderWay:
    """An exchange that has begun.

    Attributes:
        due: number of the step after which it ends.
        sent: this replica's parameters when it began, as one vector.
        mean: of all replicas, once `work` is done.
        work: the reduction; None where it is done.
    """

    due: int
    sent: Tensor
    mean: Tensor
    work: dist.Work | None


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
        overlap: steps that an exchange may take while training goes on, below H. What a replica has moved meanwhile is
            added to the common parameters, so that replicas are never quite equal.
        group: process group; None for the default one.

    Raises:
        ConfigError: where a setting is out of range.
    """

    name: ClassVar[str] = "local_updates"
    parameters_are_equal: ClassVar[bool] = False
    own_state: ClassVar[bool] = True
    on_other_replicas: str | None = "each replica has an optimizer state of its own"
    no_noise_scale: str | None = (
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
        overlap: int = 0,
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
        if not 0 <= overlap < every:
            raise ConfigError(
                f"an exchange must end before the next begins: the overlap must be from 0 to {every - 1} steps, got "
                f"{overlap}"
            )
        self.every = every
        self._outer = outer
        self._rate = outer_learning_rate
        self._momentum = outer_momentum
        self._overlap = overlap
        self._steps = 0
        self._anchor: Tensor | None = None
        self._velocity: Tensor | None = None
        self._under_way: _UnderWay | None = None
        self._spread: tuple[Tensor, dist.Work | None] | None = None

    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ARG002, ANN401 - of DDP
        """Return the model itself, with the parameters of rank 0."""
        self._begin_equal(model)
        self.replaced()
        return self._without_noise_scale(model)

    def replaced(self) -> None:
        """Take the present parameters for those of the latest exchange."""
        if self._outer == "nesterov":
            self._anchor = self._vector()
            self._velocity = torch.zeros_like(self._anchor)

    @property
    def may_differ(self) -> bool:
        """Whether there was a step since the latest exchange, or an overlapped one added what each had moved."""
        return self.num_replicas > 1 and (self._overlap > 0 or self._steps % self.every != 0)

    @property
    def spread(self) -> float | None:
        """Mean squared distance of the replicas from their mean at the latest exchange; waits for it.

        H steps of plain SGD with rate η on b samples of each replica move K replicas apart by η²·H·tr(Σ)/b·(K − 1)/K,
        to first order: so the spread follows the noise, and with |G|² of a run the noise scale.
        """
        if self._spread is None:
            return None
        total, work = self._spread
        if work is not None:
            work.wait()
        self._spread = (total, None)
        return float(total) / self.num_replicas

    def updated(self) -> None:
        """Count a step; begin an exchange after every H-th, and end it when it is due."""
        self._steps += 1
        if self._steps % self.every == 0:
            self._begin()
        if self._under_way is not None and self._under_way.due <= self._steps:
            self._end(self._under_way)

    @torch.no_grad()
    def _begin(self) -> None:
        sent = self._vector()
        mean = sent.clone()
        work = dist.all_reduce(mean, group=self.group, async_op=True) if self.num_replicas > 1 else None
        self._under_way = _UnderWay(due=self._steps + self._overlap, sent=sent, mean=mean, work=work)

    def _finish(self, exchange: _UnderWay) -> None:
        if exchange.work is not None:
            exchange.work.wait()
            exchange.work = None
            exchange.mean /= self.num_replicas

    @torch.no_grad()
    def _end(self, exchange: _UnderWay) -> None:
        self._finish(exchange)
        self._under_way = None
        spread = (exchange.sent - exchange.mean).double().square().sum()
        # Read late or never: a second round trip at each exchange would be for this one number.
        self._spread = (
            spread,
            dist.all_reduce(spread, group=self.group, async_op=True) if self.num_replicas > 1 else None,
        )
        common = exchange.mean if self._outer == "average" else self._nesterov(exchange.mean)
        if self._overlap:
            common = common + (self._vector() - exchange.sent)
        self._set(common)

    def _nesterov(self, mean: Tensor) -> Tensor:
        assert self._anchor is not None
        assert self._velocity is not None
        gradient = self._anchor - mean
        self._velocity.mul_(self._momentum).add_(gradient)
        self._anchor = self._anchor - self._rate * (gradient + self._momentum * self._velocity)
        return self._anchor

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
        """Give the model with the mean of the replicas' parameters, and put the own ones back. A collective."""
        if not self.may_differ:
            yield model, False
            return
        trained: list[Tensor] = list(self._trained())
        own = [parameter.detach().clone() for parameter in trained]
        means = mean_of(trained, group=self.group, num_replicas=self.num_replicas)
        with torch.no_grad():
            torch._foreach_copy_(trained, means)
            try:
                yield model, False
            finally:
                torch._foreach_copy_(trained, own)

    def bytes_per_step(self) -> float:
        """Return the bytes of a ring all-reduce of the parameters, over H steps."""
        return all_reduce_bytes(num_bytes(self._trained()), num_replicas=self.num_replicas) / self.every

    def state_dict(self) -> dict[str, Any]:
        """Return the steps so far, nesterov's anchor and velocity, and the exchange under way, which it waits for."""
        found: dict[str, Any] = {"steps": self._steps}
        if self._anchor is not None and self._velocity is not None:
            found |= {"anchor": self._anchor.clone(), "velocity": self._velocity.clone()}
        if self._under_way is not None:
            self._finish(self._under_way)
            found |= {
                "due": self._under_way.due,
                "sent": self._under_way.sent.clone(),
                "mean": self._under_way.mean.clone(),
            }
        return found

    def load_state_dict(self, record: State) -> None:
        """Go on from a `state_dict`."""
        like = self._vector()
        placed = {name: value.to(like, copy=True) for name, value in record.items() if isinstance(value, Tensor)}
        self._steps = int(record["steps"])
        self._under_way = None
        if self._outer == "nesterov":
            self._anchor, self._velocity = placed["anchor"], placed["velocity"]
        if "due" in record:
            self._under_way = _UnderWay(due=int(record["due"]), sent=placed["sent"], mean=placed["mean"], work=None)

    def _vector(self) -> Tensor:
        """Return all trained parameters as one new vector, in single precision at least."""
        parts = [parameter.detach().reshape(-1) for parameter in self._trained()]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        return torch.cat([part.to(dtype) for part in parts])

    def _set(self, vector: Tensor) -> None:
        trained = self._trained()
        for parameter, part in zip(trained, torch.split(vector, [p.numel() for p in trained]), strict=True):
            parameter.copy_(part.view_as(parameter))
