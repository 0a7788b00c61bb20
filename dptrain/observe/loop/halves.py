"""The two halves of one micro-batch as small batches, for a process that has nothing else to compare."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dptrain.errors import ObservationError
from dptrain.observe.geometry import Geometry
from dptrain.observe.groups import Groups
from dptrain.observe.loop.sizes import MicroBatchSizes


class HalfBatches:
    """Computes the gradient of each half of a batch beside the training, which it does not touch.

    Both halves are computed anew, at the cost of one more forward and backward pass. To take the second one from the
    whole gradient would save half of that, but is wrong under dropout, where the same sample has another mask.

    Args:
        parameters: those that are measured.
        model: whose buffers (running statistics) are put back.
        groups: which parameter belongs where.
        geometry: the norm.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, model: nn.Module, groups: Groups, geometry: Geometry
    ) -> None:
        self._parameters = parameters
        self._model = model
        self._groups = groups
        self._geometry = geometry
        self._zero = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        self._result: tuple[MicroBatchSizes, Tensor] | None = None
        self.running = False

    @property
    def ready(self) -> bool:
        """Whether the step under way was split."""
        return self._result is not None

    def run(self, loss_of: Callable[..., Tensor], batch: Sequence[Any]) -> None:
        """Compute both halves' gradients and keep their squared norms, and that of their mean.

        Raises:
            ObservationError: where there are fewer than two samples.
        """
        size = _num_samples(batch)
        if size is None or size < 2:  # noqa: PLR2004 - two halves
            raise ObservationError(f"split needs tensors of at least two samples, got {size}: use a larger micro-batch")
        bounds = [(0, size // 2), (size // 2, size)]
        buffers = [(b, b.detach().clone()) for b in self._model.buffers()]
        device = self._parameters[0].device
        self.running = True
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], device_type="cuda"):
                gradients = [self._gradient(loss_of(*_part(batch, begin, end, size))) for begin, end in bounds]
        finally:
            self.running = False
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
        weights = [(end - begin) / size for begin, end in bounds]
        sizes = MicroBatchSizes(num_samples=[end - begin for begin, end in bounds], weights=list(weights))
        mean = {
            i: sum(w * g[i] for w, g in zip(weights, gradients, strict=True) if i in g) for i in set().union(*gradients)
        }
        small = sum((w * self._squares(g) for w, g in zip(weights, gradients, strict=True)), self._zero)
        self._result = sizes, torch.cat([small, self._squares(mean)])

    def _gradient(self, loss: Tensor) -> dict[int, Tensor]:
        # Not by backward(): `.grad` belongs to the training.
        trained = [(i, p) for i, p in enumerate(self._parameters) if p.requires_grad]
        found = torch.autograd.grad(loss, [p for _, p in trained], allow_unused=True)
        return {
            i: g.to_dense() if g.is_sparse else g for (i, _), g in zip(trained, found, strict=True) if g is not None
        }

    def _squares(self, gradient: Mapping[int, Any]) -> Tensor:
        norms = {i: self._geometry.norm(i, grad) for i, grad in sorted(gradient.items())}
        return self._groups.squares(norms, zero=self._zero)

    def take(self) -> tuple[MicroBatchSizes, Tensor]:
        """Return the sizes and (Σ v‖g_k‖² by group, ‖Σ v g_k‖² by group) of the split step, and forget them."""
        assert self._result is not None
        result, self._result = self._result, None
        return result


def _num_samples(value: object) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((size for size in map(_num_samples, items) if size is not None), None)


def _part(value: Any, begin: int, end: int, size: int) -> Any:  # noqa: ANN401 - whatever the loss takes
    if isinstance(value, Tensor):
        return value[begin:end] if value.dim() and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {key: _part(item, begin, end, size) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_part(item, begin, end, size) for item in value]
    return value
