"""Predictions on shared samples, some steps old: each replica learns from its own samples, and from what others say."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dptrain.errors import ConfigError
from dptrain.exchange.base import Exchange, SharedLoss, State, all_gather_into
from dptrain.exchange.predictions import Predictions, Recorder, distance


class Codistillation(Exchange):
    """Adds to each replica's loss the distance of its predictions from those of the others, on samples that all see.

    Zhang et al. 2017 (arXiv 1706.00384) on every batch, Anil et al. 2018 (arXiv 1804.03235) with teachers that are some
    steps old, Sodhani et al. 2020 (arXiv 2011.02839) in distributed training. The predictions of step t were made at
    step t − staleness, on the samples of step t: so they travel while training goes on. In the first `staleness` steps
    there are none. The labels of the shared samples are not used. With weight 0 the replicas are an ensemble.

    Args:
        weight: of the distance in the loss, at least 0.
        staleness: steps from a prediction to its use, at least 0.
        predictions: what is compared: outputs by their squared difference, probabilities by their divergence.
        group: process group; None for the default one.

    Raises:
        ConfigError: where a setting is out of range.
    """

    name: ClassVar[str] = "codistillation"
    parameters_are_equal: ClassVar[bool] = False
    begins_apart: ClassVar[bool] = True
    on_other_replicas: str | None = "each replica has parameters of its own"
    no_noise_scale: str | None = (
        "each replica follows a loss of its own, with the predictions of the others in it: measure with "
        "exchange.kind=all_reduce"
    )

    def __init__(
        self,
        weight: float = 1.0,
        *,
        staleness: int = 10,
        predictions: Predictions = "outputs",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group=group)
        if weight < 0 or staleness < 0:
            raise ConfigError(f"weight and staleness must be at least 0, got {weight} and {staleness}")
        self._weight = weight
        self._staleness = staleness
        self._predictions: Predictions = predictions
        self._recorder: Recorder | None = None
        self._shared_loss: SharedLoss | None = None
        self._step = 0
        self._queue: list[tuple[Tensor, dist.Work | None]] = []
        self._bytes: float | None = 0.0 if weight == 0 or self.num_replicas == 1 else None

    def wrap(self, model: nn.Module, *, ignored_buffers: Collection[str] = (), **ddp: Any) -> nn.Module:  # noqa: ARG002, ANN401 - of DDP
        """Return the model itself, with its own parameters."""
        self._model = model
        self._recorder = Recorder(model)
        return self._without_noise_scale(model)

    def share(self, loss: SharedLoss) -> None:
        """Take what runs the model on samples that all replicas see."""
        self._shared_loss = loss

    @property
    def may_differ(self) -> bool:
        """Whether there is another replica."""
        return self.num_replicas > 1

    def combine(self) -> None:
        """Add the gradient of the distance from the others' predictions. A collective.

        Raises:
            ConfigError: where nothing was shared.
        """
        self._step += 1
        if self._weight == 0 or self.num_replicas == 1:
            return
        if self._staleness:
            with torch.no_grad():
                self._send(self._predict(self._step + self._staleness))
            if self._step <= self._staleness:
                return
            output = self._predict(self._step)
        else:
            output = self._predict(self._step)
            self._send(output.detach())
        targets, work = self._queue.pop(0)
        if work is not None:
            work.wait()
        others = torch.arange(self.num_replicas, device=targets.device) != self.rank
        loss = self._weight * distance(output, targets[others], predictions=self._predictions)
        loss.backward()  # type: ignore[no-untyped-call]

    def _predict(self, step: int) -> Tensor:
        """Return what this replica's model says of the shared samples of a step."""
        if self._shared_loss is None or self._recorder is None:
            raise ConfigError("codistillation needs samples that all replicas see: give exchange.share a loss on them")
        self._recorder.output = None
        self._shared_loss(self._recorder, step)
        output, self._recorder.output = self._recorder.output, None
        if output is None:
            raise ConfigError("the loss of the shared samples did not call the model")
        return output

    def _send(self, output: Tensor) -> None:
        own = output.float().contiguous()
        gathered = own.new_empty(self.num_replicas * own.shape[0], *own.shape[1:])
        work = all_gather_into(gathered, own, group=self.group, async_op=True)
        self._queue.append((gathered.view(self.num_replicas, *own.shape), work))
        self._bytes = float(own.numel() * own.element_size() * (self.num_replicas - 1))

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
        """Give this replica's model: figures are means over the replicas, each on all samples."""
        yield model, self.num_replicas > 1

    def bytes_per_step(self) -> float | None:
        """Return the bytes of an all-gather of the predictions; None before the first."""
        return self._bytes

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and the predictions that wait for theirs; it waits for those under way."""
        for _, work in self._queue:
            if work is not None:
                work.wait()
        self._queue = [(predictions, None) for predictions, _ in self._queue]
        waiting = {f"predictions/{place}": p.clone() for place, (p, _) in enumerate(self._queue)}
        return {"step": self._step, **waiting}

    def load_state_dict(self, record: State) -> None:
        """Go on from a `state_dict`."""
        self._step = int(record["step"])
        device = self._trained()[0].device
        waiting = [record[f"predictions/{place}"] for place in range(len(record) - 1)]
        self._queue = [(predictions.to(device, copy=True), None) for predictions in waiting]
