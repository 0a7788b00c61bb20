"""The held-out loss: the exact mean over all samples, however unevenly they fall on replicas and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import Dataset, default_collate

from dptrain.observe import PendingSum
from dptrain.tasks.base import Batch, LossFunction

_MICRO_BATCHES_AT_ONCE = 4  # without a graph to keep, a batch takes a fraction of the memory


def evaluate(
    model: nn.Module,
    data: Dataset[Any],
    loss: LossFunction,
    *,
    micro_batch_size: int,
    collate: Callable[[list[Any]], Batch] | None,
    rank: int,
    world_size: int,
    device: torch.device,
) -> float:
    """Return the mean loss over all samples of `data`. A collective; waits.

    Every sample counts once: a replica's last batch may be short, or missing, and weighs what it holds.

    Args:
        model: the bare module: replicas run different numbers of batches, which a wrapper would wait for.
        data: held-out samples.
        loss: mean loss of a micro-batch.
        micro_batch_size: in training; evaluation takes four times as many samples at once.
        collate: samples → batch; torch's default where None.
        rank: of this replica.
        world_size: number of replicas.
        device: where the model is.
    """
    batch_size = micro_batch_size * _MICRO_BATCHES_AT_ONCE
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for indices in _shares(len(data), batch_size=batch_size, rank=rank, world_size=world_size):  # type: ignore[arg-type]
                batch = (collate or default_collate)([data[i] for i in indices])
                mean = loss(model, send_to_device(batch, device, non_blocking=True))
                sums[0] += mean.double() * len(indices)
                sums[1] += len(indices)
    finally:
        model.train(was_training)
    total, count = PendingSum(sums).read()
    return total / count


def _shares(num_samples: int, *, batch_size: int, rank: int, world_size: int) -> Iterator[range]:
    """Yield this replica's ranges of indices: blocks dealt out in turn."""
    for start in range(rank * batch_size, num_samples, world_size * batch_size):
        yield range(start, min(start + batch_size, num_samples))
