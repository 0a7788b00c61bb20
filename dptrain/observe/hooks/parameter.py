"""A hook on the parameters: each micro-batch's gradient, seen by a tensor hook before it is accumulated."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import nn
from torch.utils.hooks import RemovableHandle

from dptrain.errors import ObservationError
from dptrain.observe.geometry import Geometry
from dptrain.observe.groups import Groups
from dptrain.observe.hooks.micro_batches import MicroBatchHook
from dptrain.observe.hooks.unhook import unhook


class ParameterHook(MicroBatchHook):
    """Squared norm of every micro-batch's gradient, under DDP with or without `no_sync` and in one process.

    A tensor hook runs once per parameter and backward pass, after tied uses were added up and before the gradient
    is accumulated or reduced. It adds one small kernel for each parameter and micro-batch, and no host sync.

    Args:
        parameters: those to watch; frozen ones are passed over.
        groups: which of them belongs where; the whole model by default.
        geometry: the norm; the plain one by default.
    """

    name = "parameters"

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, groups: Groups | None = None, geometry: Geometry | None = None
    ) -> None:
        self._watched = [p for p in parameters if p.requires_grad]
        if not self._watched:
            raise ObservationError("the model has no parameter that requires a gradient: there is nothing to measure")
        super().__init__(self._watched[0].device, groups=groups, geometry=geometry)
        self._handles: dict[int, tuple[nn.Parameter, RemovableHandle]] = {}
        self._listening = False
        self.listen(on=True)

    def begin(self, *, ignore: bool = False) -> bool:
        """Start a micro-batch; what was frozen when the step began may be trained by now (a GAN takes turns)."""
        if self._listening and len(self._handles) < len(self._watched):
            self._put_on()
        return super().begin(ignore=ignore)

    def listen(self, *, on: bool) -> None:
        """Put the hooks on the parameters, or take them off."""
        began = self.stopwatch.start()
        self._listening = on
        for parameter, handle in self._handles.values():
            unhook(parameter, handle)
        self._handles.clear()
        if on:
            self._put_on()
        self.stopwatch.stop(began)

    def _put_on(self) -> None:
        for i, p in enumerate(self._watched):
            if i not in self._handles and p.requires_grad and self._is_own(p):  # a frozen one takes no hook
                handle = p.register_hook(functools.partial(self._norms.see, i))  # type: ignore[no-untyped-call]
                self._handles[i] = (p, handle)

    def _is_own(self, parameter: nn.Parameter) -> bool:  # noqa: ARG002 - of a hook that sees some of them otherwise
        """Whether a parameter's gradient is of this replica's samples."""
        return True
