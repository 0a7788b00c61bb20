"""Puts a meter into a loop that somebody already has; what the meter does stands in `meter`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from dptrain.errors import ObservationError
from dptrain.noise import Smoothing
from dptrain.observe.build import GeometryLike, Method, Options, build_meter
from dptrain.observe.groups import GroupsLike
from dptrain.observe.hooks.ddp import CommHook
from dptrain.observe.hooks.wrapping import Reduction, identify
from dptrain.observe.loop.announce import announce_forward_passes
from dptrain.observe.loop.arguments import LossScale, check_arguments, check_optimizers, loss_factor
from dptrain.observe.loop.batch_size import MicroBatchSize
from dptrain.observe.loop.closing import close_with_optimizer
from dptrain.observe.meter import Meter

Loss = Literal["mean", "sum"]


def attach(
    model: nn.Module,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    method: Method = "auto",
    reduction: Reduction = "wrapper",
    loss: Loss = "mean",
    micro_batch_size: MicroBatchSize | None = None,
    loss_scale: LossScale | GradScaler | None = None,
    groups: GroupsLike | None = None,
    geometry: GeometryLike = "sgd",
    every: int | None = None,
    budget: float = 0.01,
    comm_hook: tuple[CommHook, object] | None = None,
    smoothing: Smoothing | None = None,
    level: float = 0.95,
    population: int | None = None,
    num_stages: int = 1,
) -> Meter:
    """Measure the gradient noise scale in a loop of your own.

    ```python
    meter = dptrain.attach(model, optimizer=optimizer)   # after wrapping in DDP or fully_shard, before training
    ...                                                  # forward, loss / accumulation_steps, backward, step: unchanged
    print(meter.reading.noise_scale)                     # when you like; only this waits
    ```

    Without `optimizer`, call `meter.step()` once per optimizer step, after the last backward pass. The step's gradient
    is taken to be the mean over its micro-batches (each loss divided by the number of accumulation steps).
    Micro-batches are distinguished by the model's forward passes with gradients, until the loop calls `meter.begin`
    itself. `docs/measure.md` has the table of wrappers.

    Args:
        model: the module that the loop calls: in DDP, wrapped by `fully_shard` or `replicate()`, Fabric's, or plain in
            one process; compiled or not.
        optimizer: whose `step` closes the meter's step, after clipping and unscaling as well; of several, the first
            that steps. With geometry="adam" its state is the preconditioner too.
        method: "parameters" sees each micro-batch and needs at least two per step, over all replicas; "hook" sees
            each replica's accumulated gradient in DDP's communication hook and needs two replicas; "auto" takes
            the parameters.
        reduction: who averages the gradients over the ranks: "wrapper" for DDP and FSDP2, "optimizer" where the
            optimizer's step (or the loop, just before it) does so and `.grad` holds the rank's own gradient until then.
        loss: whether a micro-batch's loss is the mean or the sum over its samples.
        micro_batch_size: samples in a micro-batch, or a function of the model's arguments that returns them; by
            default the first dimension that all its tensors have in common.
        loss_scale: the `GradScaler` of the loop, whose factor is used on the device; or a function, called at each
            measured step, that returns the factor on the loss. One that asks the scaler for a number
            (`scaler.get_scale`) makes the host wait for the device. With it |G|² and tr(Σ) are those of the loss
            without the factor; the noise scale is right without it too.
        groups: parts of the model that get a noise scale of their own: name → prefix or parameters, "module" for
            the first-level children, "experts" for each expert, "local_blocks" for parts with losses of their own, or
            an optimizer for its parameter groups.
        geometry: the norm: "sgd" for the plain one, "adam" for the one of Adam's preconditioner, "sign" (L1: Signum,
            Lion) and "spectral" (nuclear: Muon) for dual norms, or a mapping from groups to the latter two.
        every: measure each such step; by default the meter chooses by what measuring costs.
        budget: the share of the step time that measuring may take, where `every` is not given.
        comm_hook: with method="hook", your own communication hook and its state, which the meter calls with the bucket
            untouched.
        smoothing: how fast the past is forgotten.
        level: confidence of the interval.
        population: samples in the data set where it is small and drawn without replacement.
        num_stages: pipeline stages of one copy of the model, where `model` is one of them in DDP over the ranks that
            hold the same stage, and all ranks together are stages × replicas. The stages' norms are added up, and every
            rank reads the noise scale of the whole model. No parameter may be on two stages.

    Raises:
        ObservationError: where the meter could not be right; the text has the remedy.
    """
    check_arguments(
        model=model,
        loss=loss,
        micro_batch_size=micro_batch_size,
        loss_scale=loss_scale,
        smoothing=smoothing,
        level=level,
        budget=budget,
        population=population,
        comm_hook=comm_hook,
    )
    optimizers = _as_list(optimizer)
    check_optimizers(optimizers, parameters=model.parameters())
    meter = build_meter(
        identify(model, reduction=reduction),
        Options(
            method=method,
            loss_scale=loss_factor(loss_scale),
            groups=groups,
            geometry=geometry,
            optimizers=optimizers,
            every=every,
            budget=budget,
            comm_hook=comm_hook,
            smoothing=smoothing,
            level=level,
            population=population,
            num_stages=num_stages,
        ),
    )
    try:
        for one in optimizers:
            close_with_optimizer(meter, one)
    except ObservationError:
        meter.remove(wait=False)
        raise
    announce_forward_passes(
        model, meter=meter, micro_batch_size=micro_batch_size, summed=loss == "sum", interleaved=num_stages > 1
    )
    return meter


def _as_list(optimizer: Any) -> list[Any]:  # noqa: ANN401 - one or several
    if optimizer is None:
        return []
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
