"""An exponential moving average of the weights beside a run, held in samples, so that it survives batch changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dptrain.checkpoint.state import is_sharded, pack_model, unpack_model
from dptrain.errors import ConfigError
from dptrain.tasks.base import Moment, TrainHook
from dptrain.train.execution.master_weights import MasterWeights


class WeightAverage(TrainHook):
    """Averages the weights after each step with `torch.optim.swa_utils.AveragedModel`; buffers are the model's own.

    The decay is given for a step of the reference batch: a step of B samples keeps decay^(B/B0) of the average, so
    that the average looks back over equal numbers of samples whatever the batch is.

    Parameters of 16 bits are averaged in float32. In bfloat16, whose neighbours are 0.4 % apart, an average that moves
    by a thousandth of its distance to the weights would be rounded back in each step, and stay where it began.

    Args:
        model: not wrapped, on its device.
        decay: of a step of `reference_batch_size` samples, in [0, 1).
        reference_batch_size: in samples.
        masters: float32 copies of the model's parameters, where the optimizer moves those; then they are averaged.

    Raises:
        ConfigError: where parameters of 16 bits are sharded.
    """

    def __init__(
        self, model: nn.Module, *, decay: float, reference_batch_size: int, masters: MasterWeights | None = None
    ) -> None:
        self._decay = decay
        self._reference = reference_batch_size
        self._kept = decay
        self._masters = masters
        self._averaged = AveragedModel(model, multi_avg_fn=self._average)
        self._narrow = {name: p.dtype for name, p in self.model.named_parameters() if _is_narrow(p)}
        for name in self._narrow:
            parameter = self.model.get_parameter(name)
            if is_sharded(parameter):
                raise ConfigError(
                    f"optimizer.average_decay averages in float32, and {name} is a sharded {parameter.dtype}: build "
                    f"the model in float32 and give precision=bf16, or use execution.wrapper=ddp"
                )
            parameter.data = parameter.data.float()
        # On the host, where it is asked whether there is an average yet: on a GPU that would wait for it in each step.
        self._averaged.n_averaged = self._averaged.n_averaged.cpu()

    @property
    def model(self) -> nn.Module:
        """The averaged model, with no parameter below float32; the model as it began before the first step."""
        averaged: nn.Module = self._averaged.module
        return averaged

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Give the averaged model with its parameters in the types of the trained one's, as its loss wants."""
        wide = {name: self.model.get_parameter(name).data for name in self._narrow}
        try:
            for name, dtype in self._narrow.items():
                self.model.get_parameter(name).data = wide[name].to(dtype)
            yield self.model
        finally:
            for name, data in wide.items():
                self.model.get_parameter(name).data = data

    def on_step(self, moment: Moment) -> None:
        """Take the weights after a step into the average."""
        self._kept = self._decay ** (moment.global_batch_size / self._reference)
        self._averaged.update_parameters(self._wide(moment.model) if self._narrow else moment.model)

    def weights(self) -> dict[str, Tensor]:
        """Return the averaged weights for a checkpoint, beside which hooks have their own; sharded ones stay so."""
        return pack_model(self.model, gather=False)

    def restore(self, tensors: Mapping[str, Tensor], *, step: int) -> None:
        """Go on from `tensors` of a checkpoint after so many steps."""
        unpack_model(self.model, tensors)
        self._averaged.n_averaged.fill_(step)

    def _wide(self, model: nn.Module) -> nn.Module:
        """Return what stands for the model in an update of the average, whose parameters have at least 32 bits."""
        copies = {} if self._masters is None else self._masters.copies
        found = [copies.get(parameter, parameter) for parameter in model.parameters()]
        parameters = [parameter.float() if _is_narrow(parameter) else parameter for parameter in found]
        # The two that are asked for.
        return cast("nn.Module", SimpleNamespace(parameters=lambda: iter(parameters), buffers=model.buffers))

    @torch.no_grad()
    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], _num_averaged: Tensor | int) -> None:
        if all(tensor.is_floating_point() for tensor in averaged):
            torch._foreach_lerp_(list(averaged), list(current), 1 - self._kept)
            return
        for kept, new in zip(averaged, current, strict=True):
            if kept.is_floating_point():
                kept.lerp_(new, 1 - self._kept)
            else:
                kept.copy_(new)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < torch.float32.itemsize
