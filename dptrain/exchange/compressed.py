"""Gradients in fewer digits, by DDP's communication hook: fp16, bf16, int8 and PowerSGD, with error feedback."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dptrain.errors import ConfigError
from dptrain.exchange.base import Exchange, State, all_reduce_bytes
from dptrain.exchange.compression.codecs import PowerSgd, build_codec

CodecName = Literal["fp16", "bf16", "int8", "powersgd"]


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """A bucket of DDP whose mean is not there yet: names and gradients of its parameters, views into its buffer."""

    keys: Sequence[str]
    gradients: Sequence[Tensor]
    buffer: Tensor
    future: torch.futures.Future[Tensor]


class Compressed(Exchange):
    """Averages gradients that were rounded first; what rounding lost is added to the next step's gradient.

    Error feedback (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847) makes the sum of all updates right up
    to one step's rounding. The combined gradient has rounding noise in it, so a meter that sees the exact gradients of
    micro-batches reads |G|² too large by the squared norm of that noise; `tests/exchange/test_meter_bias.py` has it for
    each codec. PowerSGD drops directions and not digits, which is no noise that could be neglected.

    Args:
        codec: fp16 or bf16 (half the bytes), int8 (a quarter), powersgd (rank-r factors of each matrix).
        error_feedback: whether to keep what rounding loses.
        rank: of PowerSGD's factors.
        registers: whether `wrap` registers the hook; not where a meter has DDP's only slot and is given `hook()`.
        group: process group; None for the default one.

    Raises:
        ConfigError: for an unknown codec or a rank below 1.
    """

    name: ClassVar[str] = "compressed"
    parameters_are_equal: ClassVar[bool] = True
    own_state: ClassVar[bool] = True

    def __init__(
        self,
        codec: CodecName = "bf16",
        *,
        error_feedback: bool = True,
        rank: int = 2,
        registers: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group=group)
        if codec not in ("fp16", "bf16", "int8", "powersgd"):
            raise ConfigError(f"the codec must be fp16, bf16, int8 or powersgd, got {codec!r}")
        if rank < 1:
            raise ConfigError(f"the rank of PowerSGD must be at least 1, got {rank}")
        if codec == "powersgd":
            self.no_noise_scale = (
                "PowerSGD's factors leave out most of a gradient's noise, so the squared norm of the combined gradient "
                "is not that of a mean over the replicas: measure with exchange.codec=bf16 or int8"
            )
        self._codec = build_codec(codec, rank=rank, group=group)
        self._error_feedback = error_feedback
        self._registers = registers
        self._residuals: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._waiting: list[_Bucket] = []

    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ANN401 - of DDP
        """Return the model in DDP with the codec's hook; the model itself in one process."""
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        wrapped = self._in_ddp(model, ignored_buffers=ignored_buffers, **ddp)
        if self._registers and isinstance(wrapped, DistributedDataParallel):
            hook, state = self.hook()
            wrapped.register_comm_hook(state, hook)
        return wrapped if self.no_noise_scale is None else self._without_noise_scale(wrapped)

    def hook(self) -> tuple[Any, object]:
        """Return (hook, state), as `dptrain.attach` takes them for `comm_hook`."""
        return _rounded_mean, self

    @torch.no_grad()
    def reduce(self, bucket: Any) -> torch.futures.Future[Tensor]:  # noqa: ANN401 - dist.GradBucket, which torch leaves without a type
        """Take one bucket of DDP, and return what will be the mean of its rounded gradients, in its buffer.

        A codec whose messages are small waits for the last bucket of the step and sends all of them together.
        """
        if bucket.index() == 0:
            self._waiting.clear()  # of a backward pass that ended in an error
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        keys = [self._names[id(parameter)] for parameter in bucket.parameters()]
        self._waiting.append(_Bucket(keys=keys, gradients=bucket.gradients(), buffer=bucket.buffer(), future=future))
        if bucket.is_last() or not self._codec.sends_all_at_once:
            waiting, self._waiting = self._waiting, []
            for kind in dict.fromkeys((one.buffer.dtype, one.buffer.device) for one in waiting):
                self._reduce([one for one in waiting if (one.buffer.dtype, one.buffer.device) == kind])
            for one in waiting:
                one.future.set_result(one.buffer)
        return future

    def _reduce(self, buckets: Sequence[_Bucket]) -> None:
        # In the order of names: DDP lays out its buckets anew after the first step of a process, and sums of three
        # replicas or more depend on where in a message a number stands.
        found = {key: gradient for one in buckets for key, gradient in zip(one.keys, one.gradients, strict=True)}
        keys = sorted(found)
        exact = [found[key] for key in keys]
        if self._error_feedback:
            exact = [
                g + self._residuals[key] if key in self._residuals else g for key, g in zip(keys, exact, strict=True)
            ]
        means, lost = self._codec.mean(exact, keys)
        if self._error_feedback:
            # A step that is skipped for numbers that are not finite must not end up in all later ones.
            is_finite = torch.stack([mean.isfinite().all() for mean in means]).all()
            for key, part in zip(keys, lost, strict=True):
                before = self._residuals.get(key, torch.zeros((), dtype=part.dtype, device=part.device))
                self._residuals[key] = torch.where(is_finite, part, before)
        for key, mean in zip(keys, means, strict=True):
            found[key].copy_(mean)

    def rounding_sq_norm(self) -> float:
        """Return the squared norm of what this replica's rounding lost in the latest step (synchronises)."""
        return sum(float(part.double().square().sum()) for part in self._residuals.values())

    def bytes_per_step(self) -> float:
        """Return the bytes of the codec's collectives."""
        number = self.num_replicas
        sent = sum(self._codec.num_bytes(parameter, num_replicas=number) for parameter in self._trained())
        return all_reduce_bytes(sent, num_replicas=number)

    def state_dict(self) -> dict[str, Any]:
        """Return what rounding has lost so far of each parameter, and PowerSGD's factors."""
        factors = self._codec.factors if isinstance(self._codec, PowerSgd) else {}
        return {
            **{f"residual/{name}": part.clone() for name, part in sorted(self._residuals.items())},
            **{f"factor/{name}": part.clone() for name, part in sorted(factors.items())},
        }

    def load_state_dict(self, record: State) -> None:
        """Go on from a `state_dict`."""
        self._residuals = self._of("residual", record)
        if isinstance(self._codec, PowerSgd):
            self._codec.factors = self._of("factor", record)

    def load_from_others(self, records: Sequence[State]) -> None:
        """Give every replica the mean of what all have lost: in the next mean it counts as it would have."""
        mean = {name: torch.stack([record[name] for record in records]).mean(0) for name in records[0]}
        self.load_state_dict(mean)

    def _of(self, kind: str, record: State) -> dict[str, Tensor]:
        device = self._trained()[0].device
        found = {name.removeprefix(f"{kind}/"): part for name, part in record.items() if name.startswith(f"{kind}/")}
        return {name: part.to(device, copy=True) for name, part in found.items()}


# DDP inspects the signature and refuses annotations that are strings, which all of this file's are.
def _rounded_mean(state, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return state.reduce(bucket)
