"""Coefficients of the gradient in a random subspace that is redrawn from a seed: d numbers a step instead of D."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.errors import ConfigError
from dptrain.exchange.base import Exchange, State, all_gather_into

_BLOCK_ELEMENTS = 2**22
"""Random numbers generated at once: 16 MiB in single precision, whatever the size of the model."""


class RandomBases(Exchange):
    """Each replica projects its own gradient onto directions of its own; all follow the sum of the projections.

    Gressmann et al. 2020 (arXiv 2011.04720). The directions of a parameter are Gaussian and of unit length, drawn from
    (seed, step, rank, parameter), so that only coefficients are sent and every replica makes the others' directions
    itself. They are generated in blocks and never stored. Redrawn at each step the updates leave every subspace;
    `redraw=False` trains in one fixed subspace (Li et al. 2018, arXiv 1804.08838), which ends at a higher loss.

    Args:
        dimensions: directions of each replica, shared among the parameters by the square root of their sizes.
        redraw: whether directions are new in each step.
        seed: equal on all replicas.
        group: process group; None for the default one.

    Raises:
        ConfigError: for fewer than one dimension.
    """

    name: ClassVar[str] = "random_bases"
    parameters_are_equal: ClassVar[bool] = True
    on_other_replicas: str | None = "replicas follow directions of their own, which add up"
    no_noise_scale: str | None = (
        "the optimizer gets a projection of each replica's gradient onto a subspace of its own, and their mean is not "
        "the gradient of the global batch: measure with exchange.kind=all_reduce"
    )

    def __init__(
        self,
        dimensions: int = 256,
        *,
        redraw: bool = True,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group=group)
        if dimensions < 1:
            raise ConfigError(f"a random basis needs at least one direction, got {dimensions}")
        self.dimensions = dimensions
        self._redraw = redraw
        self._seed = seed
        self._step = 0

    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ARG002, ANN401 - of DDP
        """Return the model itself, with the parameters of rank 0."""
        self._begin_equal(model)
        return self._without_noise_scale(model)

    @torch.no_grad()
    def combine(self) -> None:
        """Replace each gradient by the mean over the replicas of its projections. A collective."""
        trained = [parameter for parameter in self._trained() if parameter.grad is not None]
        own = torch.cat([self._coefficients(index, parameter) for index, parameter in enumerate(trained)])
        gathered = own.new_empty(self.num_replicas * own.numel())
        if self.num_replicas > 1:
            all_gather_into(gathered, own, group=self.group)
        else:
            gathered.copy_(own)
        shares = self.shares(trained)
        rows = torch.split(gathered.view(self.num_replicas, -1), shares, dim=1)
        for index, parameter in enumerate(trained):
            assert parameter.grad is not None
            combined = torch.zeros_like(parameter.grad).reshape(-1)
            for rank in range(self.num_replicas):
                for begin, directions in self._directions(index, parameter, rank=rank, count=shares[index]):
                    combined += rows[index][rank, begin : begin + len(directions)] @ directions
            parameter.grad.copy_((combined / self.num_replicas).view_as(parameter.grad))
        self._step += 1

    def shares(self, trained: list[nn.Parameter]) -> list[int]:
        """Return how many directions each parameter has: at least one, at most its size."""
        roots = [parameter.numel() ** 0.5 for parameter in trained]
        return [
            max(1, min(parameter.numel(), round(self.dimensions * root / sum(roots))))
            for parameter, root in zip(trained, roots, strict=True)
        ]

    def _coefficients(self, index: int, parameter: nn.Parameter) -> Tensor:
        assert parameter.grad is not None
        gradient = parameter.grad.reshape(-1)
        count = self.shares([p for p in self._trained() if p.grad is not None])[index]
        blocks = self._directions(index, parameter, rank=self.rank, count=count)
        return torch.cat([directions @ gradient for _, directions in blocks])

    def _directions(
        self, index: int, parameter: nn.Parameter, *, rank: int, count: int
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the directions of one replica for one parameter, block by block: (first row, (rows, size))."""
        size = parameter.numel()
        if count == size:  # as many as the space has: the axes themselves, so that all directions are the gradient
            rows = max(1, _BLOCK_ELEMENTS // size)
            for begin in range(0, count, rows):
                yield begin, torch.eye(size, device=parameter.device, dtype=parameter.dtype)[begin : begin + rows]
            return
        text = f"{self._seed}/{self._step if self._redraw else 0}/{rank}/{index}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
        # On the host: the same numbers on every device, and on replicas of different kinds.
        generator = torch.Generator().manual_seed(seed)
        rows = max(1, _BLOCK_ELEMENTS // size)
        for begin in range(0, count, rows):
            drawn = torch.randn(min(rows, count - begin), size, generator=generator)
            drawn /= drawn.norm(dim=1, keepdim=True)
            yield begin, drawn.to(device=parameter.device, dtype=parameter.dtype)

    def bytes_per_step(self) -> float:
        """Return the bytes of an all-gather of the coefficients: each replica passes on all but its own."""
        trained = self._trained()
        coefficients = sum(
            share * parameter.element_size() for share, parameter in zip(self.shares(trained), trained, strict=True)
        )
        return float(coefficients * (self.num_replicas - 1))

    def state_dict(self) -> dict[str, Any]:
        """Return the step, from which all directions follow."""
        return {"step": self._step}

    def load_state_dict(self, record: State) -> None:
        """Go on from a `state_dict`."""
        self._step = int(record["step"])
