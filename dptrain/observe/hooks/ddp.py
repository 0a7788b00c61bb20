"""A hook in DDP's communication hook: the replica's accumulated gradient, bucket by bucket, before the all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dptrain.errors import ObservationError
from dptrain.observe.checks.gradient_checksum import GradientChecksum
from dptrain.observe.geometry import Geometry, PlainGeometry
from dptrain.observe.groups import Groups
from dptrain.observe.stopwatch import Stopwatch

GradBucket = Any  # torch.distributed.GradBucket, which torch leaves without a type
CommHook = Callable[[Any, GradBucket], Future[Tensor]]

_SPARSE = (
    "DDP's communication hook cannot see sparse gradients, as those of an embedding with sparse=True: measure with "
    "method='parameters'"
)


class DdpCommHook:
    """Squared norm of each replica's accumulated gradient: one kernel per bucket and step.

    A replica's whole local batch is one small batch, so it needs at least two replicas, and sees fewer small
    batches than a hook on the parameters where gradients are accumulated. Under `no_sync` it is not called; at the
    synchronising pass it sees the sum. It is right where one micro-batch takes several backward passes.

    DDP has one slot for such a hook, which can be neither shared nor emptied: a hook of the user's is given as
    `comm_hook` and called with the bucket untouched; after `remove` the slot passes everything through.

    Args:
        model: the DDP module, before its first backward pass.
        comm_hook: (hook, state) that reduces the bucket; DDP's own mean where not given.
        groups: which trained parameter belongs where; the whole model by default.
        geometry: the norm; the plain one by default.
    """

    name = "hook"
    accumulated = True
    squares = None

    def __init__(
        self,
        model: DistributedDataParallel,
        *,
        comm_hook: tuple[CommHook, object] | None = None,
        groups: Groups | None = None,
        geometry: Geometry | None = None,
    ) -> None:
        if any(getattr(module, "sparse", False) is True for module in model.modules()):
            raise ObservationError(_SPARSE)
        self._comm_hook: tuple[CommHook, object] = comm_hook or (_mean, model.process_group)
        self._groups = groups or Groups()
        self._geometry = geometry or PlainGeometry(self._groups.rows)
        # A plain norm of the whole needs no more than one kernel per bucket.
        self._singly = bool(self._groups.names) or not isinstance(self._geometry, PlainGeometry)
        self._indices = {id(p): i for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}
        self._norms: dict[int, Tensor] = {}
        self.repeated = False
        self._listening = True
        self._checksum: GradientChecksum | None = None
        self.outside = False
        device = next(p for p in model.parameters() if p.requires_grad).device
        self.stopwatch = Stopwatch(device)
        self._zero = torch.zeros((), dtype=torch.float64, device=device)
        try:
            model.register_comm_hook(self, _observe_bucket)
        except RuntimeError as error:
            raise ObservationError(
                f"DDP's communication hook is taken already ({error}): measure with method='parameters', "
                "or give your hook to attach as comm_hook=(hook, state) instead of registering it"
            ) from error

    def listen(self, *, on: bool) -> None:
        """Look at the buckets or only pass them on; DDP's slot cannot be emptied."""
        self._listening = on

    def begin(self, *, ignore: bool = False) -> bool:  # noqa: ARG002 - a filler adds zeros to the replica's gradient
        """Nothing to do: buckets come once per step, whatever the number of micro-batches."""
        return True

    def see(self, bucket: GradBucket) -> Future[Tensor]:
        """Note the norm of one bucket, or of each parameter in it, then reduce it."""
        if bucket.buffer().is_sparse:
            raise ObservationError(_SPARSE)
        if self._listening:
            began = self.stopwatch.start()
            if self._singly:
                for parameter, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
                    index = self._indices[id(parameter)]
                    self._note(index, self._geometry.norm(index, grad))
            else:
                self._note(bucket.index(), self._geometry.norm(0, bucket.buffer()))
            if self._checksum is not None:
                for parameter in bucket.parameters():
                    self._checksum.reduced(self._indices[id(parameter)])
            self.stopwatch.stop(began)
        reduce, state = self._comm_hook
        return reduce(state, bucket)

    def check_with(self, checksum: GradientChecksum) -> None:
        """Have `checksum` see gradients by hooks of its own: a bucket holds what was left over in `.grad` as well."""
        self._checksum = checksum
        checksum.watch()

    def keep_first(self, note: Callable[[int, Tensor], None]) -> None:
        """Do nothing: no single micro-batch is seen here."""

    def end(self) -> bool:
        """Nothing to do: the micro-batches are counted by their outputs."""
        return True

    def _note(self, key: int, norm: Tensor) -> None:
        self.repeated = self.repeated or key in self._norms
        self._norms[key] = norm

    def collect(self, weights: list[float]) -> Tensor:
        """Return ‖accumulated gradient‖²/Σv of this replica."""
        seen, self._norms, self.repeated = self._norms, {}, False
        total = sum(weights)
        if not seen or total == 0:
            return self._zero.expand(self._groups.num_entries)
        return self._groups.squares(seen, zero=self._zero) / total

    def discard(self) -> None:
        """Forget the buckets of the step under way."""
        self._norms, self.repeated = {}, False

    def remove(self) -> None:
        """Stop measuring; DDP goes on calling the hook, which only reduces."""
        self._listening = False
        self._norms = {}


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
