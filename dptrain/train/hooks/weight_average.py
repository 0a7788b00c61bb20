"""An exponential moving average of the weights beside a run, held in samples, so that it survives batch changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dptrain.checkpoint.state import pack_model, unpack_model
from dptrain.tasks.base import Moment, TrainHook


class WeightAverage(TrainHook):
    """Averages the weights after each step with `torch.optim.swa_utils.AveragedModel`; buffers are the model's own.

    The decay is given for a step of the reference batch: a step of B samples keeps decay^(B/B0) of the average, so
    that the average looks back over equal numbers of samples whatever the batch is.

    Args:
        model: not wrapped, on its device.
        decay: of a step of `reference_batch_size` samples, in [0, 1).
        reference_batch_size: in samples.
    """

    def __init__(self, model: nn.Module, *, decay: float, reference_batch_size: int) -> None:
        self._decay = decay
        self._reference = reference_batch_size
        self._kept = decay
        self._averaged = AveragedModel(model, multi_avg_fn=self._average)
        # On the host, where it is asked whether there is an average yet: on a GPU that would wait for it in each step.
        self._averaged.n_averaged = self._averaged.n_averaged.cpu()

    @property
    def model(self) -> nn.Module:
        """The averaged model; the model as it began before the first step."""
        averaged: nn.Module = self._averaged.module
        return averaged

    def on_step(self, moment: Moment) -> None:
        """Take the weights after a step into the average."""
        self._kept = self._decay ** (moment.global_batch_size / self._reference)
        self._averaged.update_parameters(moment.model)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averaged weights for a checkpoint; sharded ones stay so."""
        return pack_model(self.model, gather=False)

    def restore(self, tensors: Mapping[str, Tensor], *, step: int) -> None:
        """Go on from `tensors` of a checkpoint after so many steps."""
        unpack_model(self.model, tensors)
        self._averaged.n_averaged.fill_(step)

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
