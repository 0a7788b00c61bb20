"""A tap in DDP's communication hook: the replica's accumulated gradient, bucket by bucket, before the all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dptrain.errors import ObservationError

GradBucket = Any  # torch.distributed.GradBucket, which torch leaves without a type
CommHook = Callable[[Any, GradBucket], Future[Tensor]]


class DdpTap:
    """Squared norm of each replica's accumulated gradient: one kernel per bucket and step.

    A replica's whole local batch is one small batch, so it needs at least two replicas, and sees fewer small
    batches than a tap on the parameters where gradients are accumulated. Under `no_sync` it is not called; at the
    synchronising pass it sees the sum. It is right where one micro-batch takes several backward passes.

    DDP has one slot for such a hook, which can be neither shared nor emptied: an own hook is given as `inner` and
    is called with the bucket untouched; after `remove` the slot passes everything through.

    Args:
        model: the DDP module, before its first backward pass.
        inner: hook that reduces the bucket, DDP's own mean where not given.
        inner_state: its state.
    """

    name = "hook"
    accumulated = True

    def __init__(
        self, model: DistributedDataParallel, *, inner: CommHook | None = None, inner_state: object = None
    ) -> None:
        self._inner: CommHook = inner or _mean
        self._inner_state = model.process_group if inner is None else inner_state
        self._sq_norms: list[Tensor] = []
        self._listening = True
        self._zero = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
        try:
            model.register_comm_hook(self, _observe_bucket)
        except RuntimeError as error:
            raise ObservationError(
                f"DDP's communication hook is taken already ({error}): measure with method='parameters', "
                "or hand your hook to dptrain as `inner` instead of registering it"
            ) from error

    def begin(self, *, ignore: bool = False) -> bool:  # noqa: ARG002 - a filler adds zeros to the replica's gradient
        """Nothing to do: buckets come once per step, whatever the number of micro-batches."""
        return True

    def see(self, bucket: GradBucket) -> Future[Tensor]:
        """Note the squared norm of one bucket, then reduce it."""
        if self._listening:
            buffer = bucket.buffer()
            dtype = torch.float64 if buffer.dtype == torch.float64 else torch.float32
            self._sq_norms.append(torch.linalg.vector_norm(buffer, dtype=dtype).double().square())
        return self._inner(self._inner_state, bucket)

    def collect(self, weights: list[float]) -> Tensor:
        """Return ‖accumulated gradient‖²/Σv of this replica."""
        seen, self._sq_norms = self._sq_norms, []
        total = sum(weights)
        if not seen or total == 0:
            return self._zero
        return torch.stack(seen).sum() / total

    def remove(self) -> None:
        """Stop measuring; DDP goes on calling the hook, which only reduces."""
        self._listening = False
        self._sq_norms = []


# DDP inspects the signature and refuses annotations that are strings, which all of this file's are.
def _observe_bucket(state, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return state.see(bucket)


def _mean(group: dist.ProcessGroup, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket in the arithmetic of DDP without a hook, so that training is the same bit for bit.

    DDP multiplies by 1/world_size while it copies into the bucket; torch's own `allreduce_hook` divides instead,
    which differs in the last bit where the world size is no power of two.
    """
    buffer = bucket.buffer()
    buffer.mul_(1.0 / group.size())
    work = dist.all_reduce(buffer, group=group, async_op=True)
    assert work is not None
    return cast("Future[Tensor]", work.get_future().then(lambda future: future.value()[0]))
