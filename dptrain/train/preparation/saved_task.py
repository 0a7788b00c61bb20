"""The task of a run, built anew from the settings in a checkpoint, with the parameters that it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from dptrain.checkpoint.opened import Checkpoint
from dptrain.checkpoint.state import unpack_model
from dptrain.errors import CheckpointError, ConfigError
from dptrain.models.adaptation import adapt_model
from dptrain.models.settings import ModelConfig
from dptrain.tasks import Task, resolve_task


def saved_task(checkpoint: Checkpoint, *, what: str, tensors: Mapping[str, Tensor], quantized: bool = True) -> Task:
    """Return a run's task with its trained model, on the CPU.

    Args:
        checkpoint: of the run. The task's file must still be where it was.
        what: is built, in an error: "the teacher".
        tensors: of the model, by name.
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
        # Its adapters must be there to be filled; the weights that it once started from are no longer needed.
        adapt_model(task.model, replace(config, weights=None, new_head=None, freeze=None))
        unpack_model(task.model, tensors)
    except (TypeError, KeyError, CheckpointError) as error:
        raise ConfigError(
            f"{what} {checkpoint.path} cannot be built from the settings of its run, task {settings.get('task')}: "
            f"{error}"
        ) from error
    return task
