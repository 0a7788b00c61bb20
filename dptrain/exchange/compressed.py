"""Gradients in fewer digits, by DDP's communication hooks: fp16, bf16, int8 and PowerSGD, with error feedback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dptrain.errors import ConfigError
from dptrain.exchange.base import Exchange, all_reduce_bytes, num_bytes

Codec = Literal["fp16", "bf16", "int8", "powersgd"]

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LARGEST = 127  # of int8, symmetric round zero


class Compressed(Exchange):
    """Averages gradients that were rounded first; what rounding lost is added to the next step's gradient.

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847) makes the sum of all updates right up
    to one step's rounding. The combined gradient has rounding noise in it, so a meter that sees the exact gradients of
    micro-batches reads |G|² too large by the squared norm of that noise: see `rounding_sq_norm`.

    Args:
        codec: fp16 or bf16 (half the bytes), int8 (a quarter), powersgd (rank-r factors of each matrix, Vogels et al.
            2019, arXiv 1905.13727).
        error_feedback: whether to keep what rounding loses.
        rank: of PowerSGD's factors.
        group: process group; None for the default one.

    Raises:
        ConfigError: for an unknown codec or a rank below 1.
    """

    name: ClassVar[str] = "compressed"
    parameters_are_equal: ClassVar[bool] = True

    def __init__(
        self,
        codec: Codec = "bf16",
        *,
        error_feedback: bool = True,
        rank: int = 2,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group=group)
        if codec not in (*_HALF, "int8", "powersgd"):
            raise ConfigError(f"the codec must be fp16, bf16, int8 or powersgd, got {codec!r}")
        if rank < 1:
            raise ConfigError(f"the rank of PowerSGD must be at least 1, got {rank}")
        self.codec = codec
        self._error_feedback = error_feedback
        self._power_rank = rank
        self._power_state: PowerSGDState | None = None
        self._residuals: dict[int, Tensor] = {}
        self._names: dict[int, str] = {}

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model in DDP with the codec's hook; the model itself in one process."""
        self._model = model
        if self.num_replicas == 1:
            return model
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        wrapped = DistributedDataParallel(model, process_group=self.group, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(*self.hook())
        return wrapped

    def hook(self) -> tuple[object, Any]:
        """Return (state, hook) for `register_comm_hook`."""
        if self.codec == "powersgd":
            self._power_state = PowerSGDState(
                process_group=self.group,
                matrix_approximation_rank=self._power_rank,
                start_powerSGD_iter=2,  # the fewest that torch allows: buckets are rebuilt after one step
                use_error_feedback=self._error_feedback,
            )
            return self._power_state, powerSGD_hook
        return self, _rounded_mean

    def reduce(self, gradient: Tensor, parameters: list[Tensor]) -> Tensor:
        """Return the mean of the rounded gradients of one bucket, in the gradient's own precision."""
        kept = self._residual(gradient, parameters) if self._error_feedback else None
        exact = gradient if kept is None else gradient + kept
        rounded, mean = self._int8(exact) if self.codec == "int8" else self._half(exact)
        if kept is not None:
            kept.copy_(exact - rounded)
            self._keep(kept, parameters)
        return gradient.copy_(mean)

    def _half(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        sent = exact.to(_HALF[self.codec])
        rounded = sent.to(exact.dtype)
        # Divided before the sum, as torch's own hook does: a sum of half-precision numbers may overflow.
        sent = sent / self.num_replicas
        dist.all_reduce(sent, group=self.group)
        return rounded, sent.to(exact.dtype)

    def _int8(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Send each replica its share in int8, add in full precision, and send the sum round in int8.

        An all-reduce of int8 would need sums that fit into int8, and so lose a bit for each doubling of replicas.
        """
        size = self.num_replicas
        share = -(-exact.numel() // size)
        padded = torch.zeros(share * size, dtype=exact.dtype, device=exact.device)
        padded[: exact.numel()] = exact
        codes, scales = _quantised(padded.view(size, share))
        received, received_scales = torch.empty_like(codes), torch.empty_like(scales)
        dist.all_to_all_single(received, codes, group=self.group)
        dist.all_to_all_single(received_scales, scales, group=self.group)
        mean = (received.to(exact.dtype) * received_scales[:, None]).mean(0, keepdim=True)
        own_codes, own_scale = _quantised(mean)
        dist.all_gather_into_tensor(codes, own_codes, group=self.group)
        dist.all_gather_into_tensor(scales, own_scale, group=self.group)
        rounded = _dequantised(*_quantised(padded.view(size, share)), dtype=exact.dtype)[: exact.numel()]
        return rounded, _dequantised(codes, scales, dtype=exact.dtype)[: exact.numel()]

    def _residual(self, gradient: Tensor, parameters: list[Tensor]) -> Tensor:
        """Return what earlier steps' rounding lost of these parameters, whichever bucket they were in then."""
        parts = [self._residuals.get(id(p)) for p in parameters]
        return torch.cat(
            [
                torch.zeros(p.numel(), dtype=gradient.dtype, device=gradient.device) if part is None else part
                for p, part in zip(parameters, parts, strict=True)
            ]
        )

    def _keep(self, residual: Tensor, parameters: list[Tensor]) -> None:
        # By parameter and not by bucket: DDP lays out its buckets anew after the first step.
        for parameter, part in zip(parameters, torch.split(residual, [p.numel() for p in parameters]), strict=True):
            self._residuals[id(parameter)] = part

    def rounding_sq_norm(self) -> float:
        """Return the squared norm of what this replica's rounding lost in the latest step (synchronises)."""
        return sum(float(part.double().square().sum()) for part in self._residuals.values())

    def bytes_per_step(self) -> float:
        """Return the bytes of the codec's collectives; PowerSGD's for matrices whose factors are smaller."""
        trained = self._trained()
        if self.codec == "powersgd":
            return all_reduce_bytes(sum(map(self._power_bytes, trained)), num_replicas=self.num_replicas)
        per_element = {"fp16": 2, "bf16": 2, "int8": 1}[self.codec]
        elements = sum(p.numel() for p in trained)
        return all_reduce_bytes(per_element * elements, num_replicas=self.num_replicas)

    def _power_bytes(self, parameter: nn.Parameter) -> float:
        whole = float(num_bytes([parameter]))
        if parameter.dim() < 2:  # noqa: PLR2004 - a vector has no factors
            return whole
        rows, columns = parameter.shape[0], parameter[0].numel()
        factors = min(self._power_rank, rows, columns) * (rows + columns)
        # As torch decides it: with its default rate of 2, factors must be less than half of the matrix.
        return float(factors * parameter.element_size()) if 2 * factors < rows * columns else whole

    def state_dict(self) -> dict[str, Any]:
        """Return what rounding has lost so far of each parameter, by name.

        Raises:
            ConfigError: for PowerSGD with error feedback, whose state torch keeps by bucket.
        """
        if self.codec == "powersgd":
            raise ConfigError("PowerSGD's state cannot be saved: its factors belong to the buckets of one process")
        return {self._names[key]: part.clone() for key, part in self._residuals.items()}

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        ids = {name: key for key, name in self._names.items()}
        self._residuals = {ids[name]: part.clone() for name, part in record.items()}


# DDP inspects the signature and refuses annotations that are strings, which all of this file's are.
def _rounded_mean(state, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(state.reduce(bucket.buffer(), bucket.parameters()))
    return future


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes, and for each row the scale that its largest number becomes 127 by."""
    scales = rows.abs().amax(1) / _LARGEST
    codes = torch.where(scales[:, None] > 0, rows / scales[:, None], torch.zeros_like(rows)).round().to(torch.int8)
    return codes, scales


def _dequantised(codes: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    return (codes.to(dtype) * scales[:, None]).reshape(-1)
