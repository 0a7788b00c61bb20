"""A hook on the parameters: each micro-batch's gradient, seen by a tensor hook before it is accumulated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dptrain.errors import ObservationError
from dptrain.observe.checks.gradient_checksum import GradientChecksum
from dptrain.observe.geometry import Geometry, PlainGeometry
from dptrain.observe.groups import Groups
from dptrain.observe.hooks.micro_batches import MicroBatchNorms
from dptrain.observe.hooks.unhook import unhook
from dptrain.observe.stopwatch import Stopwatch


class ParameterHook:
    """Squared norm of every micro-batch's gradient, under DDP with or without `no_sync` and in one process.

    A tensor hook runs once per parameter and backward pass, after tied uses were added up and before the gradient
    is accumulated or reduced. It adds one small kernel for each parameter and micro-batch, and no host sync.

    Args:
        parameters: those to watch; frozen ones are passed over.
        groups: which of them belongs where; the whole model by default.
        geometry: the norm; the plain one by default.
    """

    name = "parameters"
    accumulated = False
    repeated = False

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, groups: Groups | None = None, geometry: Geometry | None = None
    ) -> None:
        self._watched = [p for p in parameters if p.requires_grad]
        if not self._watched:
            raise ObservationError("the model has no parameter that requires a gradient: there is nothing to measure")
        device = self._watched[0].device
        self.stopwatch = Stopwatch(device)
        self._norms = MicroBatchNorms(
            groups=groups or Groups(),
            geometry=geometry or PlainGeometry(),
            stopwatch=self.stopwatch,
            zero=torch.zeros((), dtype=torch.float64, device=device),
        )
        self._handles: list[tuple[nn.Parameter, RemovableHandle]] = []
        self.listen(on=True)

    def listen(self, *, on: bool) -> None:
        """Put the hooks on the parameters, or take them off."""
        began = self.stopwatch.start()
        for parameter, handle in self._handles:
            unhook(parameter, handle)
        self._handles.clear()
        if on:
            self._handles = [
                (p, p.register_hook(functools.partial(self._norms.see, i)))  # type: ignore[no-untyped-call]
                for i, p in enumerate(self._watched)
                if p.requires_grad  # a loop may freeze it later
            ]
        self.stopwatch.stop(began)

    def begin(self, *, ignore: bool = False) -> bool:
        """Start a micro-batch; one that is ignored is not looked at."""
        return self._norms.begin(ignore=ignore)

    def check_with(self, checksum: GradientChecksum) -> None:
        """Have `checksum` see each gradient too."""
        self._norms.checksum = checksum

    def keep_first(self, note: Callable[[int, Tensor], None]) -> None:
        """Have `note` see the gradients of each step's first micro-batch."""
        self._norms.keep_first = note

    @property
    def outside(self) -> bool:
        """Whether a gradient came that belongs to no micro-batch."""
        return self._norms.outside

    def end(self) -> bool:
        """End the step's last micro-batch; return False where it saw no gradient."""
        return self._norms.end()

    def collect(self, weights: list[float]) -> Tensor:
        """Return Σ ‖seen‖²/v over the micro-batches of the step."""
        return self._norms.collect(weights)

    def discard(self) -> None:
        """Forget the micro-batches of the step under way."""
        self._norms.forget()

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        self.listen(on=False)
        self._norms.forget()
