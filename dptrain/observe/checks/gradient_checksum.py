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
NUM_CHECKSUM_VALUES = 5 * NUM_CHECKS

_SIDE = 8
"""Rows and columns of the strided elements: at most 64 of a parameter, or two small kernels per micro-batch."""
_SMALLEST_ROUNDOFF = 1e-13
"""The checksums themselves are computed in double precision, to about this."""
_SPARSE, _SPARSE_HALF = 2e-5, 2e-3
"""Standard deviation of the rounding of a sparse gradient, of the sum of magnitudes: a bound, for its duplicate rows
are added up in an order that is not known here."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to a floating-point format."""
    return torch.finfo(dtype).eps / 2


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
        self._coefficients: dict[int, Tensor] = {}
        self._num_opened = 0
        self._slots: dict[int, int] = {}
        self._invalid: set[int] = set()
        self._sparse: set[int] = set()
        self._row_factors = torch.tensor([[1.0], [0.37], [0.11], [0.53]], dtype=torch.float64, device=self._device)
        self._parts: dict[int, list[tuple[int, Tensor]]] = {}
        self._accumulated: dict[int, Tensor] = {}
        self._seen_in: dict[int, torch.dtype] = {}
        self._watching = False
        self._handles: list[tuple[nn.Parameter, RemovableHandle]] = []
        self._accumulation_handles: list[RemovableHandle] = []
        self._arrived: dict[int, Tensor] = {}
        self._reduced: set[int] = set()
        self.added_late = False
        self.roundoff = _SMALLEST_ROUNDOFF
        self._from_reduced = False
        self._held: dict[int, Tensor] = {}
        self._waits_for_end = False
        self._reduced_in: torch.dtype | None = None

    def expect_reduction_in(self, dtype: torch.dtype) -> None:
        """Know that gradients are reduced over the ranks in this format, whatever they are computed in."""
        if self._reduced_in is None or unit_roundoff(dtype) > unit_roundoff(self._reduced_in):
            self._reduced_in = dtype
        self.roundoff = max(self.roundoff, unit_roundoff(dtype))

    def compare_with_reduced(self) -> None:
        """Compare `.grad` with what it was at the end of the last backward pass, not with what that brought.

        For communication hooks that lose information on purpose: what they hand on is not the average of what came, but
        a factor on it afterwards shows all the same.
        """
        self._from_reduced = True

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
        self._parts, self._accumulated, self._invalid, self._sparse = {}, {}, set(), set()
        self._reduced, self.added_late = set(), False
        self._held, self._waits_for_end = {}, False

    def note(self, index: int, grad: Tensor, *, place: int = 0) -> None:
        """Add the gradient of parameter `index`, as the backward pass of the micro-batch at `place` brings it."""
        if index not in self._slots:
            return
        if self._from_reduced and not self._waits_for_end:
            self._waits_for_end = True
            self._at_end(lambda: self._at_end(lambda: self._at_end(self._hold)))
        known = self._parts.setdefault(index, [])
        self._seen_in[index] = grad.dtype.to_real()
        if known and grad.is_sparse is not (index in self._sparse):
            self._invalid.add(index)
            return
        if grad.is_sparse:
            self._sparse.add(index)
            known.append((place, self._sparse_values(grad)))
            return
        part = self._part(index, grad, first_row=0)[1]
        known.append((place, part.to(torch.float64, copy=True)))
        if index in self._accumulated:
            self._accumulated[index] += part
        else:
            self._accumulated[index] = part.clone()

    @staticmethod
    def _at_end(call: Callable[[], None]) -> None:
        """Have `call` run at the end of the backward pass under way, after what is to run there by now.

        DDP waits there for its reductions; under a static graph it first asks, there, to do so.
        """
        torch.autograd.Variable._execution_engine.queue_callback(call)  # noqa: SLF001 - what DDP and FSDP2 use

    @torch.no_grad()
    def _hold(self) -> None:
        self._waits_for_end = False
        for index in self._slots:
            grad = self._parameters[index].grad
            if grad is not None and not grad.is_sparse:
                self._held[index] = self._part(index, grad, first_row=0)[1].to(torch.float64, copy=True)

    def _seen_reduced(self, index: int) -> Tensor:
        """Return the same as `_seen` for what `.grad` was at the end of the last backward pass."""
        held = self._held[index]
        coefficients = self._coefficients_of(index)[:, : held.shape[0], : held.shape[1]]
        products = coefficients * held
        variance = self._roundoff_of(index) ** 2 * products.square().sum((1, 2))  # of division and clipping
        return torch.stack([products.sum((1, 2)), products.abs().sum((1, 2)), variance])

    def _part(self, index: int, grad: Tensor, *, first_row: int) -> tuple[Tensor, Tensor]:
        """Return (coefficients, elements) of this piece: float64 of (NUM_FUNCTIONALS, rows, columns), and a view."""
        grad = grad.detach()
        if grad.is_complex():
            grad = torch.view_as_real(grad)
        part = grad.reshape(1) if grad.dim() == 0 else grad
        stride = max(math.ceil(self._num_rows(self._parameters[index]) / _SIDE), 1)
        start = -first_row % stride
        part = part[start::stride]
        while part.dim() > 2:  # noqa: PLR2004 - views all the way: reshaping could copy the whole gradient
            part = part[:, :, part.shape[2] // 2]
        part = part[:, :: max(math.ceil(part.shape[1] / _SIDE), 1)] if part.dim() > 1 else part[:, None]
        first = (first_row + start) // stride
        return self._coefficients_of(index)[:, first : first + part.shape[0], : part.shape[1]], part

    def _seen(self, index: int, *, num_ranks: int) -> Tensor:
        """Return (combinations, their magnitudes, variance of their rounding) of what was seen; float64 of 3·2.

        The model of rounding: each time that a format with unit roundoff u holds a number x, it is off by an error
        that is uniform within ±u·max(|x|, smallest normal number), and independent of all others. With partial sums
        s_1 … s_n of this rank's gradients g_k of an element, over R ranks, that makes the variance u²/3 times

        * Σ_j s_j² for the accumulation;
        * (R+1)·s_n² for reduction, division and clipping: R summands of which each is independent, one after another,
          have R·s_n²/2 for each rank. What equal summands have beyond that is in `with_reduction`;
        * (R+1)·Σ_k g_k² where each micro-batch is reduced by itself.

        Where g_k hardly differs from one micro-batch to the next, errors of the accumulation repeat, and add up
        linearly. So these elements are accumulated here in the gradients' own format too, and the square of the error
        that is found is added. Rounding that takes the same share from all elements (summands too small to move the
        sum) is a factor, and found as one. The checks' errors are then those of many elements with independent signs.
        """
        values = torch.stack([values for _, values in self._parts[index]])
        roundoff = self._roundoff_of(index)
        if index in self._sparse:
            combinations, magnitudes = values.sum(0)
            deviation = _SPARSE_HALF if roundoff > unit_roundoff(torch.float32) else _SPARSE
            return torch.stack([combinations, magnitudes, (deviation * magnitudes) ** 2])
        coefficients = self._coefficients_of(index)[:, : values.shape[1], : values.shape[2]]
        sums, accumulated = values.cumsum(0), self._accumulated[index]
        tiny = torch.finfo(accumulated.dtype if self._reduced_in is None else self._reduced_in).smallest_normal
        held = sums.square().sum(0)
        reduced = sums[-1].square() + (values.square() + tiny**2).sum(0)
        # Where only the copy overflows, gradients are accumulated in a wider format.
        error = (accumulated.double() - sums[-1]).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        variance = error.square() + roundoff**2 / 3 * (held + (num_ranks + 1) * reduced)
        combinations = (coefficients * sums[-1]).sum((1, 2))
        magnitudes = (coefficients.abs() * values.abs().sum(0)).sum((1, 2))
        return torch.stack([combinations, magnitudes, (coefficients.square() * variance).sum((1, 2))])

    def _roundoff_of(self, index: int) -> float:
        """Return the unit roundoff of the coarsest format that a parameter's gradient passes through."""
        grad = self._parameters[index].grad
        formats = [self._reduced_in, self._seen_in.get(index), None if grad is None else grad.dtype.to_real()]
        return max([_SMALLEST_ROUNDOFF, *(unit_roundoff(dtype) for dtype in formats if dtype is not None)])

    def _sparse_values(self, grad: Tensor) -> Tensor:
        """Return the same of a sparse gradient: of all its elements, coalesced or not, for few rows have any."""
        grad = grad.detach()
        places, values = grad._indices(), grad._values()  # noqa: SLF001 - the public ones ask for a coalesced tensor
        values = values.reshape(values.shape[0], -1)
        values = torch.view_as_real(values).flatten(1) if values.is_complex() else values
        columns = torch.arange(values.shape[1], dtype=torch.float64, device=values.device)
        rows = (places.double() * self._row_factors[: places.shape[0]]).sum(0)
        # Smooth functions of the place: fixed, of either sign, and alike in no two neighbours.
        weights = [torch.cos(rows[:, None] * a + columns * b) for a, b in ((1.3, 0.7), (2.1, 1.9))]
        products = torch.stack(weights) * values.double()
        return torch.stack([products.sum((1, 2)), products.abs().sum((1, 2))])

    def _coefficients_of(self, index: int) -> Tensor:
        if index not in self._coefficients:
            generator = torch.Generator().manual_seed(index)
            shape = (NUM_FUNCTIONALS, _SIDE, _SIDE)
            self._coefficients[index] = torch.randn(shape, generator=generator).to(self._device, torch.float64)
        return self._coefficients[index]

    @torch.no_grad()
    def vector(self, *, num_ranks: int = 1) -> Tensor:
        """Return this rank's part, to be summed over the ranks: `NUM_CHECKSUM_VALUES` float64.

        They are (seen, magnitudes, variance of rounding, combined, combined²) of all checks, see `_seen`.

        Args:
            num_ranks: over which gradients are reduced.
        """
        self.let_go()
        self.roundoff = max([self.roundoff, *map(self._roundoff_of, self._slots)])
        number, count = self._shard
        seen = torch.zeros(3, NUM_CHECKED, NUM_FUNCTIONALS, dtype=torch.float64, device=self._device)
        combined = torch.zeros(NUM_CHECKED, NUM_FUNCTIONALS, dtype=torch.float64, device=self._device)
        for index, slot in self._slots.items():
            parameter = self._parameters[index]
            grad = parameter.grad
            if index in self._invalid or (
                grad is not None and index in self._parts and grad.is_sparse is not (index in self._sparse)
            ):
                continue
            if self._from_reduced and (index not in self._held or (grad is not None and grad.is_sparse)):
                continue
            if self._from_reduced:
                seen[:, slot] = self._seen_reduced(index)
            elif index in self._parts:
                seen[:, slot] = self._seen(index, num_ranks=num_ranks)
            if grad is not None and grad.is_sparse:
                combined[slot] = self._sparse_values(grad)[0] * count
            elif grad is not None:
                local = grad.to_local() if hasattr(grad, "to_local") else grad
                rows = self._num_rows(parameter)
                piece = math.ceil(rows / count)  # as torch.chunk cuts
                first_row = min(number * piece, rows)
                if local.numel():
                    coefficients, part = self._part(index, local, first_row=first_row)
                    combined[slot] = (coefficients * part.double()).sum((1, 2)) * count
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
                chosen = [values for place, values in parts if place in places]
                if not chosen:
                    continue
                total = torch.stack(chosen).sum(0)
                if index in self._sparse:
                    found[slot] += sign * total[0]
                else:
                    coefficients = self._coefficients_of(index)[:, : total.shape[0], : total.shape[1]]
                    found[slot] += sign * (coefficients * total).sum((1, 2))
        return found.flatten()
