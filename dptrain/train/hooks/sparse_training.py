"""Weights kept at zero by masks, and masks that move while training; the loop and the optimizer do not know of it.

A tensor hook on each sparse weight takes the masked part out of its gradient in each backward pass, before it is
accumulated, reduced or measured. So the averaged gradient, its norm, the optimizer's moments and the noise scale are
those of the trained weights alone: the noise scale of the problem that is being solved, that of the sparse model.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dptrain.errors import CheckpointError
from dptrain.models.settings import SparsityConfig
from dptrain.models.sparsity import drop_fraction, moved_mask, random_masks, sparse_parameters
from dptrain.tasks.base import Moment, TrainHook


class SparseTraining(TrainHook):
    """Holds the masks of a run. It is the one hook that changes parameters, on all replicas alike.

    Masks move by the gradient of one step: the step after each multiple of `update_every_samples` keeps the gradient of
    all weights, its sum over the replicas says what grows, and parameters that are equal say what is dropped. So masks
    are equal on all replicas. A step whose gradient is not finite moves nothing. Each move makes the host wait once.

    Args:
        config: method static or rigl.
        model: not wrapped, on its device. Its masked weights are set to zero.
        optimizer: over its parameters.
        max_samples: length of the run.
        seed: of the first masks.
    """

    def __init__(
        self, config: SparsityConfig, model: nn.Module, *, optimizer: Optimizer, max_samples: int, seed: int
    ) -> None:
        self._config = config
        self._optimizer = optimizer
        self._max_samples = max_samples
        self._every = config.update_every_samples or max(1, max_samples // 100)
        self._weights = sparse_parameters(model, config)
        masks = random_masks(self._weights, config, seed=seed)
        self._zeros = {name: ~mask for name, mask in masks.items()}
        self._keeps_gradients = False
        self._gradients: dict[str, Tensor] = {}
        self._num_moves = 0
        self._clear()
        for name, weight in self._weights.items():
            weight.register_hook(partial(self._masked, name))  # type: ignore[no-untyped-call]

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by the names of their weights, True where a weight is trained."""
        return {name: ~zeros for name, zeros in self._zeros.items()}

    def on_step(self, moment: Moment) -> None:
        """Keep masked weights at zero, whatever the optimizer did; move the masks, or note that the next step will."""
        before = moment.samples_seen - moment.global_batch_size
        if self._keeps_gradients:
            self._keeps_gradients = False
            self._move(progress=before / self._max_samples)
        elif self._config.method == "rigl" and moment.samples_seen < self._config.end_fraction * self._max_samples:
            self._keeps_gradients = before // self._every < moment.samples_seen // self._every
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.masked_fill_(self._zeros[name], 0)

    def state_dict(self) -> Mapping[str, Any]:
        """Return whether the next step moves the masks, and how often they were."""
        return {"keeps_gradients": self._keeps_gradients, "num_moves": self._num_moves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._keeps_gradients, self._num_moves = bool(state["keeps_gradients"]), int(state["num_moves"])

    def tensors(self) -> dict[str, Tensor]:
        """Return the masks."""
        return self.masks

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the masks of a checkpoint; without any, those of this run are put on the parameters that it has now.

        Raises:
            CheckpointError: where they are of other weights.
        """
        if tensors:
            own = {name: zeros.shape for name, zeros in self._zeros.items()}
            if own != {name: mask.shape for name, mask in tensors.items()}:
                raise CheckpointError(
                    f"the checkpoint has masks of {', '.join(tensors)}, and this run of {', '.join(own)}: give the "
                    f"settings of sparsity that it was written with"
                )
            self._zeros = {name: ~tensors[name].to(zeros.device) for name, zeros in self._zeros.items()}
        self._clear()

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient of the trained weights; runs once for each weight and backward pass."""
        if self._keeps_gradients:
            # Without a gradient so far it is the step's first pass, also where the step was begun anew.
            if self._weights[name].grad is None:
                self._gradients[name] = gradient.detach().clone()
            else:
                self._gradients[name] += gradient
        # Filled, not multiplied: infinity times zero is no number.
        return gradient.masked_fill(self._zeros[name], 0)

    @torch.no_grad()
    def _move(self, *, progress: float) -> None:
        # Zero where no pass of this replica reached a weight: the others may have.
        gradients = {name: self._gradients.pop(name, torch.zeros_like(p)) for name, p in self._weights.items()}
        if dist.is_available() and dist.is_initialized():
            for name in self._weights:  # in one order on all replicas
                dist.all_reduce(gradients[name])
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values()):
            return
        fraction = drop_fraction(self._config, progress=progress)
        for name, weight in self._weights.items():
            before = ~self._zeros[name]
            mask = moved_mask(before, weight=weight, gradient=gradients[name], fraction=fraction)
            self._zeros[name] = ~mask
            self._forget(weight, ~(mask & before))
        self._num_moves += 1

    def _clear(self) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                self._forget(weight, self._zeros[name])

    def _forget(self, weight: nn.Parameter, places: Tensor) -> None:
        """Set some weights and what the optimizer remembers of them to zero."""
        weight.masked_fill_(places, 0)
        for value in self._optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(places, 0)
