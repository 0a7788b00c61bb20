"""What a checkpoint of a run holds: packed from the live run, and put back into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from dptrain.checkpoint.manifest import JSON
from dptrain.checkpoint.opened import Checkpoint
from dptrain.checkpoint.state import pack_model, pack_optimizer, unpack_model, unpack_optimizer
from dptrain.config.filled_in import given
from dptrain.config.train_config import TrainConfig
from dptrain.cost.flops import FlopCounter
from dptrain.errors import CheckpointError, ConfigError
from dptrain.runtime.hosts.task_identity import TaskIdentity
from dptrain.tasks.base import TrainHook
from dptrain.tracking.run_log import RunLog
from dptrain.train.execution.loss_scale import LossScale
from dptrain.train.execution.master_weights import MasterWeights
from dptrain.train.hooks import WeightAverage
from dptrain.train.run_progress import RunProgress


class RunState:
    """The model, the optimizer and the decisions of a run, to and from a checkpoint.

    Args:
        config: filled in.
        model: not wrapped.
        optimizer: of the model's parameters.
        run: how far the run is.
        num_samples: of the training data.
        identity: of the task.
        world_size: number of replicas.
        hook: is called at saves, and has a state.
        average: of the weights, where there is one.
        masters: float32 copies of bfloat16 parameters.
        loss_scale: of float16 training.
        flops: what passes of known shapes cost.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        run: RunProgress,
        num_samples: int,
        identity: TaskIdentity,
        world_size: int,
        hook: TrainHook,
        average: WeightAverage | None,
        masters: MasterWeights | None = None,
        loss_scale: LossScale | None = None,
        flops: FlopCounter | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._optimizer = optimizer
        self._run = run
        self._num_samples = num_samples
        self._identity = identity
        self._world_size = world_size
        self._hook = hook
        self._average = average
        self._masters = masters
        self._loss_scale = loss_scale
        self._flops = flops or FlopCounter()
        # Now: after a forward pass FSDP has the gathered parameters in the modules, and the optimizer has the shards.
        named = {parameter: name for name, parameter in model.named_parameters()}
        self._names = named if masters is None else masters.names

    def pack(self) -> tuple[int, tuple[Mapping[str, Mapping[str, torch.Tensor]], Mapping[str, JSON]]]:
        """Return the step, the tensors (sharded ones as they are) and the state that a checkpoint of now holds."""
        self._hook.on_save(self._run.moment(self._model))
        optimizer_tensors, optimizer_state = pack_optimizer(self._optimizer, names=self._names, gather=False)
        state: dict[str, JSON] = {
            "config": asdict(self._config),
            "world_size": self._world_size,
            "num_samples": self._num_samples,
            "data": self._identity.state(position=self._run.progress.position),
            "optimizer": optimizer_state,
            "hook": dict(self._hook.state_dict()),
            "flops": self._flops.state(),
            "loss_scale": None if self._loss_scale is None else self._loss_scale.state(),
            **self._run.state(),
        }
        tensors = {"model": pack_model(self._model, gather=False), "optimizer": optimizer_tensors}
        if self._average is not None:
            tensors["average"] = self._average.tensors()
        if self._masters is not None:
            tensors["masters"] = self._masters.tensors()
        if beside := self._hook.tensors():
            tensors["hook"] = dict(beside)
        return self._run.progress.step, (tensors, state)

    def check_same_data(self, saved: Checkpoint, *, is_own: bool = True) -> None:
        """Refuse a checkpoint from which this data would go on in another order, or with other samples.

        Args:
            saved: the checkpoint.
            is_own: of this run, whose teacher must be the same as well; not of one that it branches off from.
        """
        state: dict[str, Any] = saved.state
        if state["num_samples"] != self._num_samples:
            raise ConfigError(
                f"the data set had {state['num_samples']} samples when {saved.path} was saved and has "
                f"{self._num_samples} now: the order of samples would be another one"
            )
        self._identity.check(state, position=int(state["progress"]["position"]), path=saved.path)
        if is_own:
            self._identity.check_digests(state, path=saved.path)

    def restore(self, saved: Checkpoint, log: RunLog) -> None:
        """Become what the saved run was when it was saved."""
        state: dict[str, Any] = saved.state
        for path, reason in saved.passed_over:
            log.note(f"passed over checkpoint {path}: {reason}")
        if saved.passed_over:
            log.note(f"{saved.steps_lost:,} steps are taken again for it")
        for change in self._identity.changes(state):
            log.note(change)
        with _complete(saved):
            self._unpack(saved)
            self._run.restore(state)
            self._hook.load_state_dict(state.get("hook", {}))
            if self._average is not None:
                self._average.restore(saved.tensors("average"), step=self._run.progress.step)
            self._flops.restore(state.get("flops", []))
            if self._loss_scale is not None and state.get("loss_scale") is not None:
                self._loss_scale.restore(state["loss_scale"])
        progress = self._run.progress
        log.note(f"resumed from step {progress.step:,}, {progress.position:,} samples seen")

    def begin_as(self, other: Checkpoint, log: RunLog) -> None:
        """Begin a run of its own where another one was: with its parameters, optimizer and position, and no more."""
        state: dict[str, Any] = other.state
        settings = [{**group, "params": None} for group in self._optimizer.param_groups]
        with _complete(other):
            self._unpack(other)
            for group, own in zip(self._optimizer.param_groups, settings, strict=True):
                group.update({**own, "params": group["params"]})
            position = int(state["progress"]["position"])
        if position >= given(self._config.max_samples):
            raise ConfigError(
                f"max_samples {self._config.max_samples} counts from the beginning of the run that is branched from, "
                f"which has seen {position} samples at {other.path}: give more"
            )
        self._run.begin_at(position)
        log.note(f"branched from {other.path}, {position:,} samples seen")

    def _unpack(self, checkpoint: Checkpoint) -> None:
        unpack_model(self._model, checkpoint.tensors("model"))
        unpack_optimizer(
            self._optimizer,
            names=self._names,
            tensors=checkpoint.tensors("optimizer"),
            state=checkpoint.state["optimizer"],
        )
        if self._masters is not None:
            self._masters.restore(checkpoint.tensors("masters"))
        self._hook.load_tensors(checkpoint.tensors("hook") if checkpoint.holds("hook") else {})


@contextmanager
def _complete(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of a checkpoint that lacks something that it does."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} does not hold what this version needs: {error}") from error
