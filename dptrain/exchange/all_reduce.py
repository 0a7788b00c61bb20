"""The exact mean of the gradients, by DDP: what every other kind is compared with."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dptrain.exchange.base import Exchange, all_reduce_bytes, num_bytes


class AllReduce(Exchange):
    """Averages gradients over the replicas while the backward pass goes on.

    Args:
        options: of `DistributedDataParallel`.
    """

    name: ClassVar[str] = "all_reduce"
    parameters_are_equal: ClassVar[bool] = True

    def __init__(self, **options: Any) -> None:  # noqa: ANN401 - those of DistributedDataParallel
        super().__init__(group=options.pop("group", None))
        self._options = {"gradient_as_bucket_view": True, **options}

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model in DDP; the model itself in one process."""
        self._model = model
        if self.num_replicas == 1:
            return model
        return DistributedDataParallel(model, process_group=self.group, **self._options)

    def bytes_per_step(self) -> float:
        """Return the bytes of a ring all-reduce of the gradients."""
        return all_reduce_bytes(num_bytes(self._trained()), num_replicas=self.num_replicas)
