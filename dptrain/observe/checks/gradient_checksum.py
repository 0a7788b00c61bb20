"""A linear checksum of a few gradient elements: what the micro-batches brought must add up to what `.grad` holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Container, Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dptrain.observe.hooks.unhook import unhook

NUM_CHECKED = 4
"""Parameters in the checksum of one step. They rotate, so that all of a model come up in turn."""
NUM_FUNCTIONALS = 2
"""Per parameter: two, so that a factor found by one can be contradicted by the other."""
NUM_CHECKS = NUM_CHECKED * NUM_FUNCTIONALS
NUM_CHECKSUM_VALUES = 4 * NUM_CHECKS

_SIDE = 8
"""Rows and columns of the strided elements: at most 64 of a parameter, or five small kernels per micro-batch."""
_TOLERANCE, _TOLERANCE_HALF = 1e-4, 1e-2
"""Of the sum of magnitudes. Rounding stays below 1e-6 in single precision and 1e-3 in bfloat16, in loops of 16
micro-batches on 4 ranks."""
_FACTOR_SIGNAL, _FACTOR_EACH = 20.0, 5.0
"""Checks in units of what rounding explains, together and in each of two, from which on a factor is divided out. The
unit is ten times the rounding seen, so a factor is known to 0.5 % at least."""


class GradientChecksum:
    """Adds up fixed random combinations of gradient elements, as the backward passes bring them and from `.grad`.

    Both are linear, so they agree where `.grad` is the sum of all that was seen over the replicas, divided as the
    wrapper does. A factor on the whole of `.grad` (clipping by norm, a loss scale taken out) shows as one ratio in all
    checks and is divided out. Stale, cleared or unevenly changed gradients show as different ratios.

    Args:
        parameters: those that are trained, in the order that the hook counts them.
        shard: (number, count) of this rank's piece of each parameter's first dimension; (0, 1) where `.grad` is whole.
        eligible: which parameters are cut along their first dimension or not at all.
        num_rows: rows of each parameter before it is cut; by default those of the parameter.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        shard: tuple[int, int] = (0, 1),
        eligible: Callable[[nn.Parameter], bool] = lambda _: True,
        num_rows: Callable[[nn.Parameter], int] = lambda p: p.shape[0] if p.dim() else 1,
    ) -> None:
        self._parameters = parameters
        self._shard = shard
        self._num_rows = num_rows
        self._eligible = [i for i, p in enumerate(parameters) if eligible(p)]
        self._device = parameters[0].device
        self._coefficients: dict[tuple[int, torch.dtype], Tensor] = {}
        self._num_opened = 0
        self._slots: dict[int, int] = {}
        self._invalid: set[int] = set()
        self._sparse: set[int] = set()
        self._row_factors = torch.tensor([[1.0], [0.37], [0.11], [0.53]], dtype=torch.float64, device=self._device)
        self._parts: dict[int, list[tuple[int, Tensor]]] = {}
        self._watching = False
        self._handles: list[tuple[nn.Parameter, RemovableHandle]] = []
        self._accumulation_handles: list[RemovableHandle] = []
        self._arrived: dict[int, Tensor] = {}
        self._reduced: set[int] = set()
        self.added_late = False
        self.half_precision = False

    def open(self) -> None:
        """Choose the parameters of the step that begins; equal on all ranks that measure the same steps."""
        count = len(self._eligible)
        # Neighbours in a model are often alike (weight and bias), so the chosen ones lie a quarter of the model apart.
        spread = (
            {(self._num_opened + k * max(count // NUM_CHECKED, 1)) % count for k in range(NUM_CHECKED)}
            if count
            else set()
        )
        self._slots = {self._eligible[position]: slot for slot, position in enumerate(sorted(spread))}
        self._num_opened += 1
        self.forget()
        if self._watching:
            self.watch()

    def watch(self) -> None:
        """See the gradients by tensor hooks on the chosen parameters, where nobody calls `note`.

        A tensor hook also runs for `torch.autograd.grad`, whose result never reaches `.grad`. So what it sees counts
        only once the same parameter's gradient was accumulated.
        """
        self._watching = True
        self.let_go()
        for index in self._slots:
            parameter = self._parameters[index]
            if parameter.requires_grad:
                arrived = functools.partial(self._arrived.__setitem__, index)
                handle = parameter.register_hook(arrived)  # type: ignore[no-untyped-call]
                accumulated = functools.partial(self._note_arrived, index)
                self._handles.append((parameter, handle))
                register = parameter.register_post_accumulate_grad_hook
                self._accumulation_handles.append(register(accumulated))  # type: ignore[no-untyped-call]

    def _note_arrived(self, index: int, _: Tensor) -> None:
        self.added_late = self.added_late or index in self._reduced
        if index in self._arrived:
            self.note(index, self._arrived.pop(index))

    def reduced(self, index: int) -> None:
        """Know that the gradient of parameter `index` was reduced: what is added to it from now on is not averaged."""
        if index in self._slots:
            self._reduced.add(index)

    def let_go(self) -> None:
        """Take the hooks off until the next step opens."""
        self._arrived.clear()
        for accumulation in self._accumulation_handles:
            accumulation.remove()
        self._accumulation_handles.clear()
        for parameter, handle in self._handles:
            unhook(parameter, handle)
        self._handles.clear()

    def forget(self) -> None:
        """Drop what was seen in this step."""
        self._parts, self._invalid, self._sparse = {}, set(), set()
        self._reduced, self.added_late = set(), False

    def note(self, index: int, grad: Tensor, *, place: int = 0) -> None:
        """Add the gradient of parameter `index`, as the backward pass of the micro-batch at `place` brings it."""
        if index not in self._slots:
            return
        known = self._parts.setdefault(index, [])
        if known and grad.is_sparse is not (index in self._sparse):
            self._invalid.add(index)
            return
        if grad.is_sparse:
            self._sparse.add(index)
        values = self._sparse_values(grad) if grad.is_sparse else self._values(index, grad, first_row=0)
        known.append((place, values))

    def _values(self, index: int, grad: Tensor, *, first_row: int) -> Tensor:
        """Return (combinations, sums of their magnitudes) of the elements of this piece, as float64 of 2·2."""
        grad = grad.detach()
        if grad.is_complex():
            grad = torch.view_as_real(grad)
        if grad.dtype in (torch.float16, torch.bfloat16):
            self.half_precision = True
        part = grad.reshape(1) if grad.dim() == 0 else grad
        stride = max(math.ceil(self._num_rows(self._parameters[index]) / _SIDE), 1)
        start = -first_row % stride
        part = part[start::stride]
        while part.dim() > 2:  # noqa: PLR2004 - views all the way: reshaping could copy the whole gradient
            part = part[:, :, part.shape[2] // 2]
        part = part[:, :: max(math.ceil(part.shape[1] / _SIDE), 1)] if part.dim() > 1 else part[:, None]
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        first = (first_row + start) // stride
        coefficients = self._coefficients_of(index, dtype)[:, first : first + part.shape[0], : part.shape[1]]
        products = coefficients * part.to(dtype)
        return torch.stack([products.sum((1, 2)), products.abs().sum((1, 2))]).double()

    def _sparse_values(self, grad: Tensor) -> Tensor:
        """Return the same of a sparse gradient: of all its elements, coalesced or not, for few rows have any."""
        grad = grad.detach()
        places, values = grad._indices(), grad._values()  # noqa: SLF001 - the public ones ask for a coalesced tensor
        values = values.reshape(values.shape[0], -1)
        values = torch.view_as_real(values).flatten(1) if values.is_complex() else values
        if values.dtype in (torch.float16, torch.bfloat16):
            self.half_precision = True
        columns = torch.arange(values.shape[1], dtype=torch.float64, device=values.device)
        rows = (places.double() * self._row_factors[: places.shape[0]]).sum(0)
        # Smooth functions of the place: fixed, of either sign, and alike in no two neighbours.
        weights = [torch.cos(rows[:, None] * a + columns * b) for a, b in ((1.3, 0.7), (2.1, 1.9))]
        products = torch.stack(weights) * values.double()
        return torch.stack([products.sum((1, 2)), products.abs().sum((1, 2))])

    def _coefficients_of(self, index: int, dtype: torch.dtype) -> Tensor:
        key = index, dtype
        if key not in self._coefficients:
            generator = torch.Generator().manual_seed(index)
            shape = (NUM_FUNCTIONALS, _SIDE, _SIDE)
            self._coefficients[key] = torch.randn(shape, generator=generator).to(self._device, dtype)
        return self._coefficients[key]

    @torch.no_grad()
    def vector(self) -> Tensor:
        """Return this rank's (seen, magnitudes, combined, combined²), to be summed over the ranks; a float64 vector."""
        self.let_go()
        number, count = self._shard
        seen = torch.zeros(2, NUM_CHECKED, NUM_FUNCTIONALS, dtype=torch.float64, device=self._device)
        combined = torch.zeros(NUM_CHECKED, NUM_FUNCTIONALS, dtype=torch.float64, device=self._device)
        for index, slot in self._slots.items():
            parameter = self._parameters[index]
            grad = parameter.grad
            if index in self._invalid or (
                grad is not None and index in self._parts and grad.is_sparse is not (index in self._sparse)
            ):
                continue
            if index in self._parts:
                seen[:, slot] = torch.stack([values for _, values in self._parts[index]]).sum(0)
            if grad is not None and grad.is_sparse:
                combined[slot] = self._sparse_values(grad)[0] * count
            elif grad is not None:
                local = grad.to_local() if hasattr(grad, "to_local") else grad
                rows = self._num_rows(parameter)
                piece = math.ceil(rows / count)  # as torch.chunk cuts
                first_row = min(number * piece, rows)
                if local.numel():
                    combined[slot] = self._values(index, local, first_row=first_row)[0] * count
        self.forget()
        return torch.cat([seen.flatten(), combined.flatten(), combined.square().flatten()])

    @property
    def keys(self) -> list[Hashable]:
        """What the checksums of the step under way are of: (parameter, combination), in their order."""
        indices = {slot: index for index, slot in self._slots.items()}
        return [(indices.get(slot), k) for slot in range(NUM_CHECKED) for k in range(NUM_FUNCTIONALS)]

    @torch.no_grad()
    def contrast(self, first: Container[int], second: Container[int]) -> Tensor:
        """Return the checksums of the micro-batches at places in `first` less those in `second`."""
        found = torch.zeros(NUM_CHECKED, NUM_FUNCTIONALS, dtype=torch.float64, device=self._device)
        for index, slot in self._slots.items():
            parts = self._parts.get(index, ())
            for places, sign in ((first, 1.0), (second, -1.0)):
                if chosen := [values[0] for place, values in parts if place in places]:
                    found[slot] += sign * torch.stack(chosen).sum(0)
        return found.flatten()

    def tolerance(self) -> float:
        """Return the relative difference that rounding explains."""
        return _TOLERANCE_HALF if self.half_precision else _TOLERANCE


def common_factor(
    seen: Sequence[float], magnitudes: Sequence[float], combined: Sequence[float], *, tolerance: float
) -> float | None:
    """Return the factor between `combined` and `seen`: 1 where they agree, None where there is no one factor.

    Args:
        seen: checksums of what the backward passes brought, averaged as the wrapper does.
        magnitudes: sums of magnitudes, in the same unit.
        combined: checksums of `.grad`.
        tolerance: relative to the magnitudes.
    """
    checks = [(s, c, m * tolerance) for s, m, c in zip(seen, magnitudes, combined, strict=True)]
    if all(abs(s - c) <= margin for s, c, margin in checks):
        return 1.0
    # In units of what rounding explains; a check without magnitude has no gradient, and then .grad must have none.
    if any(margin == 0 and c != 0 for _, c, margin in checks):
        return None
    scaled = [(s / margin, c / margin) for s, c, margin in checks if margin > 0]
    signal = sum(s * s for s, _ in scaled)
    if signal == 0:
        return None
    factor = sum(s * c for s, c in scaled) / signal
    # Rounding is relative to what `.grad` holds, so a small factor does not excuse a large difference.
    alike = all(abs(c - factor * s) <= abs(factor) for s, c in scaled)
    told_apart = signal > _FACTOR_SIGNAL**2 and sum(abs(s) > _FACTOR_EACH for s, _ in scaled) > 1
    # Negated gradients, of a loop that ascends, have the factor −1; cleared ones have none.
    return factor if alike and told_apart and factor != 0 else None


def combined_differs(
    combined: Sequence[float], squares: Sequence[float], magnitudes: Sequence[float], *, tolerance: float
) -> bool:
    """Say whether `.grad` is not the same on all ranks.

    Args:
        combined: mean over the ranks of their checksums.
        squares: mean over the ranks of the squared checksums.
        magnitudes: sums of magnitudes, in the same unit.
        tolerance: relative to the magnitudes.
    """
    return any(
        math.sqrt(max(square - mean * mean, 0.0)) > tolerance * size + 1e-7 * abs(mean)
        for mean, square, size in zip(combined, squares, magnitudes, strict=True)
    )
