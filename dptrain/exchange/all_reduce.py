"""The exact mean of the gradients, by DDP: what every other kind is compared with."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from torch import nn

from dptrain.exchange.base import Exchange, all_reduce_bytes, num_bytes


class AllReduce(Exchange):
    """Averages gradients over the replicas while the backward pass goes on."""

    name: ClassVar[str] = "all_reduce"
    parameters_are_equal: ClassVar[bool] = True

    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ANN401 - of DDP
        """Return the model in DDP; the model itself in one process."""
        return self._in_ddp(model, ignored_buffers=ignored_buffers, **ddp)

    def bytes_per_step(self) -> float | None:
        """Return the bytes of a ring all-reduce of the gradients; None where another wrapper reduces them."""
        if self._model is None:
            return None
        return all_reduce_bytes(num_bytes(self._trained()), num_replicas=self.num_replicas)
