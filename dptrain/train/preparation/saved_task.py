"""The task of a run, built anew from the settings in a checkpoint, with the parameters that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dptrain.checkpoint.opened import Checkpoint
from dptrain.checkpoint.state import pack_model, unpack_model
from dptrain.data.source import random_state_kept
from dptrain.errors import CheckpointError, ConfigError
from dptrain.exchange.members import model_of
from dptrain.models.adaptation import adapt_model, merge_adapters
from dptrain.models.settings import ModelConfig
from dptrain.tasks import Task, resolve_task

_ADAPTER = ".lora_"
"""In the names of adapters' parameters, as peft gives them."""


def saved_task(checkpoint: Checkpoint, *, what: str, tensors: Mapping[str, Tensor], quantized: bool = True) -> Task:
    """Return a run's task with its trained model, on the CPU.

    Args:
        checkpoint: of the run. The task's file must still be where it was.
        what: is built, in an error: "the teacher".
        tensors: of the model, by name; floating-point ones in any type, such as the bfloat16 of bf16_parameters.
        quantized: whether layers compute in the run's number format; in full precision otherwise.

    Raises:
        ConfigError: where the task cannot be built.
    """
    settings: Any = checkpoint.state["config"]
    try:
        task = resolve_task(settings["task"], options=settings["task_options"])
        config = ModelConfig(**settings.get("model", {}))
        if not quantized:
            config = replace(config, quantize=None)
        if not any(_ADAPTER in name for name in tensors):  # they are merged
            config = replace(config, lora_rank=None, lora_targets=None)
        # Its adapters must be there to be filled; the weights that it once started from are no longer needed.
        adapt_model(task.model, replace(config, weights=None, new_head=None, freeze=None))
        fill_model(task.model, tensors)
    except (TypeError, KeyError, CheckpointError) as error:
        raise ConfigError(
            f"{what} {checkpoint.path} cannot be built from the settings of its run, task {settings.get('task')}: "
            f"{error}"
        ) from error
    return task


def trained_weights(checkpoint: Checkpoint, *, remedy: str) -> dict[str, Tensor]:
    """Return the tensors of a run's model, with the float32 copies of precision=bf16_parameters where there are any.

    Args:
        checkpoint: of the run.
        remedy: as of `model_of`.

    Raises:
        ConfigError: where replicas are models of their own.
    """
    masters = checkpoint.tensors("masters") if checkpoint.holds("masters") else {}
    return model_of(checkpoint, remedy=remedy) | masters


def without_adapters(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a run's model with low-rank adapters merged, under the names of the model without them.

    The task is built anew, since it says what kind of layer each is; random states stay as they are.

    Args:
        checkpoint: of the run.
        tensors: of its model, by name; returned as they are where there are no adapters.

    Raises:
        ConfigError: where the task cannot be built, or adapters cannot be merged.
    """
    if not any(_ADAPTER in name for name in tensors):
        return dict(tensors)
    what = "merging low-rank adapters needs the task of the run:"
    with random_state_kept():
        model = saved_task(checkpoint, what=what, tensors=tensors, quantized=False).model
    merge_adapters(model)
    return pack_model(model)


def fill_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors of any floating-point type into a model whose parameters keep their own.

    Raises:
        CheckpointError: where names or shapes differ, or types of whole numbers.
    """
    own = model.state_dict()
    cast = {
        name: tensor.to(own[name].dtype)
        if name in own and tensor.is_floating_point() and own[name].is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }
    unpack_model(model, cast)
