"""Norms of single micro-batches, collected parameter by parameter, and what the hooks that see them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from dptrain.errors import ObservationError
from dptrain.observe.checks.gradient_checksum import GradientChecksum
from dptrain.observe.geometry import Geometry, PlainGeometry
from dptrain.observe.groups import Groups
from dptrain.observe.stopwatch import Stopwatch


class MicroBatchNorms:
    """One norm for each parameter of the micro-batch under way, one sum of squares for each before it in the step.

    Norms are written to the same places again and again. Fresh scalars would be allocated among the gradients and
    outlive them; the C allocator, which cannot move them, then returns the memory round them to the system and has to
    fetch it anew in each backward pass, which costs as much as the norms.

    Args:
        groups: which parameter belongs where.
        geometry: the norm.
        stopwatch: counts the time spent here.
        zero: a float64 zero on the device.
    """

    def __init__(self, *, groups: Groups, geometry: Geometry, stopwatch: Stopwatch, zero: Tensor) -> None:
        self._groups = groups
        self._norm = geometry.norm
        self._stopwatch = stopwatch
        self._zero = zero
        self._places: dict[tuple[int, torch.dtype], Tensor] = {}
        self._squares: list[Tensor] = []
        self._last: dict[int, Tensor] | None = None
        self._current: dict[int, Tensor] | None = None
        self._overlap = False
        self._ignoring = False
        self.checksum: GradientChecksum | None = None
        self.outside = False
        self.squares: Tensor | None = None
        self.keep_first: Callable[[int, Tensor], None] | None = None

    def begin(self, *, ignore: bool) -> bool:
        """Start a micro-batch, or a filler that is not looked at.

        Returns:
            False where the micro-batch begun before saw no gradient, so that this one takes its place.
        """
        self._ignoring = ignore
        if ignore:
            self._current = None
            return True
        if self._last is not None and not self._last:
            self._current = self._last
            return False
        began = self._stopwatch.start()
        self._close_last()
        self._current = self._last = {}
        self._stopwatch.stop(began)
        return True

    def see(self, index: int, grad: Tensor) -> None:
        """Note the gradient of parameter `index`. Runs once per parameter and micro-batch: keep it short."""
        norms = self._current
        if norms is None:
            self.outside = self.outside or not self._ignoring
            return
        began = self._stopwatch.start()
        if index in norms:
            self._overlap = True
        if self.checksum is not None:
            self.checksum.note(index, grad, place=len(self._squares))
        if self.keep_first is not None and not self._squares:
            self.keep_first(index, grad)
        if grad.is_sparse:
            grad = grad.coalesce().values()
        key = index, grad.dtype
        # A gradient knows its history only under create_graph; elsewhere a detach would cost 1 µs for nothing.
        norm = self._norm(index, grad.detach() if grad.requires_grad else grad, out=self._places.get(key))
        norms[index] = self._places[key] = norm
        self._stopwatch.stop(began)

    def end(self) -> bool:
        """End the step's last micro-batch; return False where it saw no gradient, and forget it then."""
        if self._last is None or self._last:
            return True
        self._last = self._current = None
        return False

    def _close_last(self) -> None:
        if self._last:
            self._squares.append(self._groups.squares(self._last, zero=self._zero))
        self._last = None

    def collect(self, weights: list[float]) -> Tensor:
        """Return Σ ‖seen‖²/v over the micro-batches of the step, by group, and forget them.

        Raises:
            ObservationError: where what was seen cannot be split into micro-batches.
        """
        self._close_last()
        seen, overlap = self._squares, self._overlap
        self.forget()
        if overlap:
            raise ObservationError(
                "a parameter received two gradients within one micro-batch (several backward() calls after one "
                "forward), so the squares cannot be added up: measure with method='hook' under DDP, or add the "
                "losses and call backward() once"
            )
        if len(seen) != len(weights):
            raise ObservationError(
                f"{len(weights)} micro-batches were announced but gradients of {len(seen)} were seen: "
                "each forward pass in training mode needs its backward pass before the step is closed"
            )
        self.squares = torch.stack(seen) if self.checksum is not None and len(seen) > 1 else None
        total = self._zero.expand(self._groups.num_entries)
        for squares, weight in zip(seen, weights, strict=True):
            total = total + squares / weight
        return total

    def take(self) -> list[Tensor]:
        """Return the squares by group of each micro-batch of the step, and forget them."""
        self._close_last()
        seen = self._squares
        self.forget()
        return seen

    def forget(self) -> None:
        """Drop what was seen."""
        self._squares, self._last, self._current, self._overlap = [], None, None, False
        self._ignoring = self.outside = False


class MicroBatchHook(ABC):
    """A hook that sees each micro-batch singly; subclasses say where the gradients come from.

    Args:
        device: of the gradients.
        groups: which trained parameter belongs where; the whole model by default.
        geometry: the norm; the plain one by default.
    """

    accumulated = False
    repeated = False

    def __init__(self, device: torch.device, *, groups: Groups | None, geometry: Geometry | None) -> None:
        self.stopwatch = Stopwatch(device)
        groups = groups or Groups()
        self._norms = MicroBatchNorms(
            groups=groups,
            geometry=geometry or PlainGeometry(groups.rows),
            stopwatch=self.stopwatch,
            zero=torch.zeros((), dtype=torch.float64, device=device),
        )

    @abstractmethod
    def listen(self, *, on: bool) -> None:
        """Put the hooks on the parameters, or take them off."""

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
    def squares(self) -> Tensor | None:
        """Squared norms of the micro-batches of the step collected last; None for less than two."""
        return self._norms.squares

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
        """Take all hooks off."""
        self.listen(on=False)
        self._norms.forget()
