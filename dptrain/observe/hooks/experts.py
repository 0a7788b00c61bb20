"""A hook for experts that replicas share out: each sees gradients of others' samples, and sends their squares back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.observe.geometry import PlainGeometry
from dptrain.observe.groups import Groups
from dptrain.observe.hooks.micro_batches import MicroBatchNorms
from dptrain.observe.hooks.parameter import ParameterHook


class Share(Protocol):
    """A rank's share of the experts of a layer.

    Attributes:
        group: of the ranks that have all experts together.
        num_ranks: in it.
        watch: is called in each backward pass with the weights, the number of a rank of the group, and the gradient
            from that rank's samples alone.
    """

    group: dist.ProcessGroup
    num_ranks: int
    watch: Callable[[Tensor, int, Tensor], None] | None


class ExpertParallelHook(ParameterHook):
    """Squared norm of every micro-batch's gradient, that of the experts it went to on other ranks included.

    What is summed is what it would be if each replica had all experts, to rounding: the gradient of an expert is seen
    for each rank's samples singly, and its square goes to that rank, which knows size and weight of the micro-batch. It
    takes one all-to-all in a measured step.

    Args:
        parameters: of the model.
        num_parts: of each trained one, in how many parts it is on as many ranks.
        shares: of the layers with experts, all with the same group.
        groups: which trained parameter belongs where.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, num_parts: Sequence[int], shares: Sequence[Share], groups: Groups
    ) -> None:
        trained = [p for p in parameters if p.requires_grad]
        self._parts = {id(p): i for i, (p, number) in enumerate(zip(trained, num_parts, strict=True)) if number > 1}
        self._shares = shares
        self._group = shares[0].group
        super().__init__(trained, groups=groups)
        self._of_ranks = [
            MicroBatchNorms(
                groups=groups,
                geometry=PlainGeometry(groups.rows),
                stopwatch=self.stopwatch,
                zero=torch.zeros((), dtype=torch.float64, device=trained[0].device),
            )
            for _ in range(shares[0].num_ranks)
        ]
        self._num_passes = 0
        self._own_passes: list[int] = []

    def begin(self, *, ignore: bool = False) -> bool:
        """Start a micro-batch. The experts are looked at in a filler, too: other ranks have sent them samples."""
        for norms in self._of_ranks:
            norms.begin(ignore=False)
        opened = super().begin(ignore=ignore)
        if opened and not ignore:
            self._own_passes.append(self._num_passes)
        self._num_passes += 1
        return opened

    def listen(self, *, on: bool) -> None:
        """Put the hooks on the parameters and on the experts, or take them off."""
        super().listen(on=on)
        for share in self._shares:
            share.watch = self._see if on else None

    def collect(self, weights: list[float]) -> Tensor:
        """Return Σ ‖seen‖²/v over the micro-batches of the step, their experts' part included. A collective."""
        passes, self._own_passes, self._num_passes = self._own_passes, [], 0
        total = super().collect(weights)
        # Each rank has seen as many passes, its fillers included: (rank whose samples, pass, group).
        seen = torch.stack([torch.stack(norms.take()) for norms in self._of_ranks])
        received = torch.empty_like(seen)
        dist.all_to_all_single(received, seen, group=self._group)
        squares = received.sum(0)
        for number, weight in zip(passes, weights, strict=True):
            total = total + squares[number] / weight
        return total

    def discard(self) -> None:
        """Forget the micro-batches of the step under way."""
        super().discard()
        for norms in self._of_ranks:
            norms.forget()
        self._own_passes, self._num_passes = [], 0

    def _see(self, weight: Tensor, rank: int, grad: Tensor) -> None:
        self._of_ranks[rank].see(self._parts[id(weight)], grad)

    def _is_own(self, parameter: nn.Parameter) -> bool:
        return id(parameter) not in self._parts
