"""Whether the replicas still have the same parameters and buffers, to the last bit; DDP itself never looks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dptrain.errors import DesyncError
from dptrain.observe.reduction import PendingSum

_BITS_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAX_NAMES = 3
_ABSENT = torch.iinfo(torch.int64).min
"""In place of the sum of what a replica does not hold; the least number, which no reduction by the largest sees."""


def compared_tensors(model: nn.Module, *, also: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a model that are the same on all replicas between two steps.

    The running statistics of normalisation layers are not, but for those that are combined: each replica updates its
    own from its own samples, and DDP overwrites them with those of rank 0 at the next forward pass.

    Args:
        model: not wrapped.
        also: names of running statistics that replicas combine, and that are the same, too.
    """
    yield from ((name, model.get_buffer(name)) for name in also)
    yield from model.named_parameters()
    for place, module in model.named_modules():
        running = ("running_mean", "running_var") if isinstance(module, _NormBase) else ()
        for name, buffer in module.named_buffers(recurse=False):
            if name not in running:
                yield f"{place}.{name}" if place else name, buffer


class ReplicaCheck:
    """Compares the tensors of all replicas now and then, with one small reduction that is read a step later.

    Each replica adds up the bits of each tensor, as whole numbers: one pass over the tensors, without a wait. The
    largest and the smallest sum over all replicas are equal where there is no drift.

    Args:
        parameters: by name, in the same order on all replicas; see `compared_tensors`.
        every_steps: steps between two comparisons; 0: never.
        may_differ: whether replicas need not be equal just now; the same answer on all of them.
        part_of: by name, which part of a parameter this replica holds, from 0, and of how many; parts are compared
            with the same parts elsewhere.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        every_steps: int,
        may_differ: Callable[[], bool] = lambda: False,
        part_of: Callable[[str], tuple[int, int]] = lambda _: (0, 1),
    ) -> None:
        self._parameters = dict(parameters)
        parts = {name: part_of(name) for name in self._parameters}
        self._slots = [
            f"{name} (part {i + 1} of {n})" if n > 1 else name for name, (_, n) in parts.items() for i in range(n)
        ]
        firsts = accumulate((number for _, number in parts.values()), initial=0)
        self._places = [first + part for first, (part, _) in zip(firsts, parts.values(), strict=False)]
        self._every_steps = every_steps if dist.is_initialized() and dist.get_world_size() > 1 else 0
        self._may_differ = may_differ
        self._pending: tuple[int, Tensor, PendingSum] | None = None

    def start(self, step: int) -> None:
        """Begin a comparison where one is due after `step`; a collective on such steps. Does not wait."""
        if self._every_steps and step % self._every_steps == 0 and not self._may_differ():
            self._begin(step)

    def _begin(self, step: int) -> None:
        sums = torch.stack([_sum_of_bits(p) for p in self._parameters.values()])
        places = torch.tensor(self._places, device=sums.device)
        own, negative = (
            sums.new_full((len(self._slots),), _ABSENT).index_copy_(0, places, values) for values in (sums, -sums)
        )
        self._pending = (step, own, PendingSum(torch.cat([own, negative]), op=dist.ReduceOp.MAX))

    def check(self, step: int) -> None:
        """Compare now, and wait for it: before the state after `step` is saved, or is the end. A collective.

        Raises:
            DesyncError: as `finish`.
        """
        self.finish()
        if self._every_steps and not self._may_differ():
            self._begin(step)
            self.finish()

    def finish(self) -> None:
        """End the comparison under way, if there is one.

        Raises:
            DesyncError: where replicas differ; the text names the tensors and the replicas.
        """
        if self._pending is None:
            return
        (step, own, pending), self._pending = self._pending, None
        extremes = pending.read()
        half = len(extremes) // 2
        apart = [index for index in range(half) if extremes[index] != -extremes[half + index]]
        if apart:
            raise DesyncError(self._complaint(step, own, apart))

    def _complaint(self, step: int, own: Tensor, apart: Sequence[int]) -> str:
        """Ask every replica for its sums; a collective, which all enter, for all have seen the same difference."""
        mine = own[list(apart)]
        sums = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(sums, mine)
        ranks = sorted({rank for found in torch.stack(sums, dim=1).tolist() for rank in _suspects(found)})
        shown = ", ".join(self._slots[index] for index in apart[:_MAX_NAMES])
        more = f" and {len(apart) - _MAX_NAMES} more" if len(apart) > _MAX_NAMES else ""
        # With two replicas it is unknown which one is right.
        who = "both replicas" if len(sums) == 2 else f"rank {', '.join(map(str, ranks))} of {len(sums)}"  # noqa: PLR2004 - two
        return (
            f"the replicas have drifted apart by step {step}: {shown}{more} on {who}; go on from an earlier "
            "checkpoint, and look for code that changes parameters or buffers on some replicas only, such as a loss "
            "that calls a method of the model instead of the model, or a buffer updated from a replica's own samples"
        )


def _suspects(sums: Sequence[int]) -> set[int]:
    """Return the ranks whose sum is not that of most, or all where there is no most, of those that have the tensor."""
    (most, count), (_, next_count), *_ = Counter(found for found in sums if found != _ABSENT).most_common()
    return {rank for rank, found in enumerate(sums) if found != _ABSENT and (found != most or count == next_count)}


@torch.no_grad()
def _sum_of_bits(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    values = tensor.detach().contiguous()
    if values.is_complex():
        values = torch.view_as_real(values)
    return values.view(_BITS_AS[values.element_size()]).sum(dtype=torch.int64)
