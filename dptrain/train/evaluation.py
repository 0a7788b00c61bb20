"""Held-out figures: exact over all samples, however unevenly they fall on replicas and batches."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from dptrain.errors import TaskError
from dptrain.exchange import Exchange
from dptrain.observe import PendingSum
from dptrain.tasks.base import Batch, Task, split_loss
from dptrain.tasks.evaluation_check import held_out_loss
from dptrain.train.execution.wrapping import is_sharded
from dptrain.train.hooks.weight_average import WeightAverage


class HeldOut:
    """Evaluates a run's task: the weights, and their average where there is one.

    Args:
        task: its held-out sets, loss and metrics.
        model: not wrapped, on its device.
        average: of the weights.
        exchange: which model the figures are of, where replicas have different ones.
        rank: of this replica.
        world_size: number of replicas.
        device: where the model is.
        precision: makes the context of a forward pass.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        *,
        average: WeightAverage | None,
        exchange: Exchange,
        rank: int,
        world_size: int,
        device: torch.device,
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._task = task
        self._model = model
        self._average = average
        self._exchange = exchange
        self._layout: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "device": device,
            "precision": precision,
        }

    def figures(self, *, batch_size: int, beat: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return the figures by name, empty for a task without held-out data. A collective; waits.

        Args:
            batch_size: as for `evaluate_task`.
            beat: called after each batch, for the watchdog.
        """
        if not self._task.eval_sets:
            return {}
        with self._exchange.evaluating(self._model) as (model, see_all):
            layout = {**self._layout, "rank": 0, "world_size": 1} if see_all else self._layout
            figures = evaluate_task(self._task, model, batch_size=batch_size, beat=beat, **layout)
        if self._average is not None:
            with self._average.evaluating() as model:
                averaged = evaluate_task(self._task, model, batch_size=batch_size, beat=beat, **self._layout)
            figures |= {f"average/{name}": value for name, value in averaged.items()}
        return figures


def evaluate_task(
    task: Task,
    model: nn.Module,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return the figures of all held-out sets of a task by name. A collective; waits.

    Of a single set they are `loss`, the named parts of the loss, `eval_metrics` and `metrics`; of several each has the
    name of its set before it (`test/loss`), and those of the first set stand without one as well.

    Args:
        task: data, loss and metrics.
        model: the bare module: replicas run different numbers of batches, which a wrapper would wait for.
        batch_size: samples at a time on a replica; the micro-batch size, which is known to fit into memory.
        rank: of this replica.
        world_size: number of replicas.
        device: where the model is.
        precision: makes the context of a forward pass.
        beat: called after each batch, for the watchdog.
    """
    figures: dict[str, float] = {}
    for key, data in task.eval_sets.items():
        found = _evaluate(
            task,
            model,
            data,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            device=device,
            precision=precision,
            beat=beat,
        )
        found |= {name: figure(found["loss"]) for name, figure in task.eval_metrics.items()}
        if not figures:
            figures = dict(found)
        if key:
            figures |= {f"{key}/{name}": value for name, value in found.items()}
    return figures


def _evaluate(
    task: Task,
    model: nn.Module,
    data: Dataset[Any],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[object]],
    beat: Callable[[], None],
) -> dict[str, float]:
    """Return the mean loss, its parts and the metrics over one set."""
    metrics = {name: copy.deepcopy(metric).to(device) for name, metric in task.metrics.items()}
    for metric in metrics.values():
        metric.reset()
    sums: dict[str, Tensor] = {}
    others: set[str] | None = None
    num_seen = 0
    # Module by module: one that its user keeps in eval mode while others train stays there.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            in_step = is_sharded(model)
            layout = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
            for indices, counts in _shares(len(data), in_step=in_step, **layout):  # type: ignore[arg-type]
                beat()
                batch = send_to_device(_read(data, indices, collate=task.collate), device, non_blocking=True)
                with precision():
                    loss, outputs = held_out_loss(task, model, batch)
                total, parts = split_loss(loss)
                weight = len(indices) if counts else 0
                if sums and parts.keys() | {"loss"} != sums.keys():
                    others = others or set(parts)  # raised below: replicas may still be in passes with one another
                    continue
                for name, mean in {"loss": total, **dict(sorted(parts.items()))}.items():
                    # Selected, not multiplied: a mean that is not finite must not reach the sum of who has no share.
                    share = mean.double() * weight if counts else torch.zeros((), dtype=torch.float64, device=device)
                    sums[name] = sums.get(name, 0) + share
                num_seen += weight
                if counts:
                    for metric in metrics.values():
                        metric.update(*outputs)
    finally:
        for module, was_training in modes:
            module.training = was_training
    _check_parts(sums.keys() - {"loss"}, others=others, device=device)
    count = torch.tensor(num_seen, dtype=torch.float64, device=device)
    *totals, count_all = PendingSum(torch.stack([*sums.values(), count])).read()
    figures = {name: total / count_all for name, total in zip(sums, totals, strict=True)}
    return figures | {name: _over_replicas(name, metric) for name, metric in metrics.items()}


def _check_parts(parts: AbstractSet[str], *, others: AbstractSet[str] | None, device: torch.device) -> None:
    """Refuse parts of the held-out loss that some batches have and others have not. A collective; waits.

    Their sums travel by place, and are divided by the number of all samples.

    Args:
        parts: names of those of this replica's first batch.
        others: of a later batch, where they are others.
        device: where the collective runs.

    Raises:
        TaskError: where any two batches on any replicas have other parts; on all replicas alike.
    """
    number = float(zlib.crc32(repr(sorted(parts)).encode()))
    extremes = torch.tensor([number, -number, float(others is not None)], dtype=torch.float64, device=device)
    largest, smallest, differ = PendingSum(extremes, op=dist.ReduceOp.MAX).read()
    if largest == -smallest and not differ:
        return
    here = "another set on another replica" if others is None else f"{_listed(others)} for another"
    raise TaskError(
        f"the held-out loss returned the parts {_listed(parts)} for one batch and {here}: return the same ones for "
        f"each batch, or make it one of the task's metrics"
    )


def _listed(names: AbstractSet[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _read(data: Dataset[Any], indices: range, *, collate: Callable[[list[Any]], Batch] | None) -> Batch:
    if collate is None and hasattr(data, "read_batch"):
        return data.read_batch(np.array(indices))
    return (collate or default_collate)([data[index] for index in indices])


def _shares(
    num_samples: int, *, batch_size: int, rank: int, world_size: int, in_step: bool = False
) -> Iterator[tuple[range, bool]]:
    """Yield this replica's ranges of indices, and whether they count: blocks dealt out in turn.

    Blocks are the same on any number of replicas, so that a loss that depends on its batch is the same, too. A replica
    without one runs the first for nothing: only so does it know the names of the parts of the loss. With `in_step` all
    replicas have the same number.
    """
    starts = range(rank * batch_size, num_samples, world_size * batch_size)
    for start in starts or [0]:
        yield range(start, min(start + batch_size, num_samples)), bool(starts)
    num_rounds = -(-num_samples // (batch_size * world_size)) if in_step else 0
    for _ in range(num_rounds - max(len(starts), 1)):
        yield range(min(batch_size, num_samples)), False


def _gathered(count: int, state: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Return the count and the state of every replica; as safetensors, since pickles of others are never loaded.

    Args:
        count: of updates.
        state: name → tensor, or list of tensors, on the host.
    """
    parts = {"count": torch.tensor([count])}
    for name, value in state.items():
        if isinstance(value, list):
            parts |= {f"list/{name}/{index}": part for index, part in enumerate(value)}
        else:
            parts[f"tensor/{name}"] = value
    # Copies, since safetensors refuses tensors that share memory, such as one that a metric was given twice.
    parts = {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
    own = torch.frombuffer(bytearray(save(parts)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([own.numel()]))
    longest = max(int(size) for size in sizes)
    buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(buffers, torch.nn.functional.pad(own, (0, longest - own.numel())))
    found = []
    for buffer, size in zip(buffers, sizes, strict=True):
        tensors = load(buffer[: int(size)].numpy().tobytes())
        theirs: dict[str, Any] = {}
        for name in state:
            listed = sum(key.startswith(f"list/{name}/") for key in tensors)
            theirs[name] = tensors.get(f"tensor/{name}", [tensors[f"list/{name}/{index}"] for index in range(listed)])
        found.append((int(tensors["count"]), theirs))
    return found


def _over_replicas(name: str, metric: Any) -> float:  # noqa: ANN401 - torchmetrics is not always installed
    """Return a metric of all replicas' samples.

    Not by the metric's own synchronisation, which waits for ever where one replica has filled a list and another has
    not. States are put together in the order of the ranks, those without a sample left out.
    """
    metric._to_sync = metric.sync_on_compute = False  # noqa: SLF001 - compute looks at the first
    if dist.is_initialized() and dist.get_world_size() > 1:
        state = {key: _on_host(getattr(metric, key)) for key in metric._defaults}  # noqa: SLF001 - it has no other list
        gathered = _gathered(int(metric._update_count), state)  # noqa: SLF001 - as above
        states = [found for num_updates, found in gathered if num_updates]
        metric = metric.to("cpu")
        metric.reset()
        for key, reduction in metric._reductions.items():  # noqa: SLF001 - as above
            setattr(metric, key, _combined(name, [found[key] for found in states], reduction=reduction))
        metric._update_count = sum(num_updates for num_updates, _ in gathered)  # noqa: SLF001 - it warns at 0
    value = metric.compute()
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TaskError(f"metric {name!r} must give one number, such as with average='macro', got {value}")
    return float(value)


def _combined(name: str, states: list[Any], *, reduction: Callable[[Tensor], Tensor] | None) -> Any:  # noqa: ANN401 - a tensor or a list of some
    if isinstance(states[0], list):
        return [item for state in states for item in state]
    function = getattr(reduction, "__name__", None)
    if function == "dim_zero_mean":
        # Every replica would weigh the same, whatever its number of samples.
        raise TaskError(f"metric {name!r} keeps a mean, which is not exact over replicas: use one that keeps sums")
    if function == "dim_zero_cat":
        return torch.cat(states)
    stacked = torch.stack(states)
    return stacked if reduction is None else reduction(stacked)


def _on_host(value: Any) -> Any:  # noqa: ANN401 - a tensor or a list of some
    return [item.cpu() for item in value] if isinstance(value, list) else value.cpu()
