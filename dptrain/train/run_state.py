"""What a checkpoint of a run holds: packed from the live run, and put back into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from dptrain.checkpoint.manifest import JSON
from dptrain.checkpoint.opened import Checkpoint
from dptrain.checkpoint.state import pack_model, pack_optimizer, unpack_model, unpack_optimizer
from dptrain.checkpoint.store import load_newest
from dptrain.config.filled_in import given
from dptrain.config.resume_check import check_same_settings
from dptrain.config.train_config import TrainConfig
from dptrain.cost.flops import FlopCounter
from dptrain.errors import CheckpointError, ConfigError
from dptrain.exchange import Exchange
from dptrain.exchange.members import gathered, member_name
from dptrain.runtime.hosts.task_identity import TaskIdentity
from dptrain.tasks.base import TrainHook
from dptrain.tracking.run_folder import checkpoints_in
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
        exchange: what replicas send one another.
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
        exchange: Exchange,
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
        self._exchange = exchange
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
        """Return the step, the tensors (sharded ones as they are) and the state that a checkpoint of now holds.

        A collective where `takes_all`.
        """
        self._hook.on_save(self._run.moment(self._model))
        placed = self._exchange.placed
        optimizer_tensors, optimizer_state = pack_optimizer(
            self._optimizer, names=self._names, gather=False, placed=placed
        )
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
        tensors = {"model": pack_model(self._model, gather=False, placed=placed), "optimizer": optimizer_tensors}
        exchange = self._exchange.state_dict()
        state["exchange"] = {name: value for name, value in exchange.items() if not isinstance(value, torch.Tensor)}
        if parts := {name: value for name, value in exchange.items() if isinstance(value, torch.Tensor)}:
            tensors["exchange"] = parts
        if of_members := self._of_members():
            own = {name: tensors[name] for name in of_members if name in tensors}
            tensors |= gathered(own, device=next(self._model.parameters()).device)
        if self._average is not None:
            tensors["average"] = self._average.weights()
        if self._masters is not None:
            tensors["masters"] = self._masters.tensors()
        if beside := self._hook.tensors():
            tensors["hook"] = dict(beside)
        return self._run.progress.step, (tensors, state)

    def _of_members(self) -> tuple[str, ...]:
        """Return the groups of tensors that each replica has for itself."""
        groups = ("exchange",) if self._exchange.own_state else ()
        return groups if self._exchange.parameters_are_equal else ("model", "optimizer", *groups)

    @property
    def takes_all(self) -> bool:
        """Whether to pack takes all replicas, because each has something of its own."""
        return self._world_size > 1 and bool(self._of_members())

    def of_all_models(self, entries: frozenset[str]) -> frozenset[str]:
        """Return entries of the model (`model/mask`) under the names of all models that a checkpoint holds.

        Of replicas that have models of their own, and of the average of the weights, whose buffers are the model's.
        """
        names = [entry.removeprefix("model/") for entry in entries]
        ranks = range(1 if self._exchange.parameters_are_equal else self._world_size)
        models = [member_name("model", rank) for rank in ranks] + ["average"] * (self._average is not None)
        return frozenset(f"{model}/{name}" for model in models for name in names)

    def check(self, saved: Checkpoint | None, branch: Checkpoint | None) -> None:
        """Refuse checkpoints that this run can neither resume nor branch from.

        Raises:
            ConfigError: with what differs.
        """
        if saved is not None:
            self._check_same_run(saved)
        for checkpoint in (saved, branch):
            if checkpoint is not None:
                self._check_same_data(checkpoint, is_own=checkpoint is saved)

    def begin(self, saved: Checkpoint | None, branch: Checkpoint | None, log: RunLog) -> None:
        """Become what the saved run was, or begin where another one was, or as built; log it."""
        if saved is not None:
            self._restore(saved, log)
        elif branch is not None:
            self._begin_as(branch, log)
        if self._exchange.no_noise_scale is not None and saved is None:
            log.note(f"noise scale not measured: {self._exchange.no_noise_scale}")

    def _check_same_data(self, saved: Checkpoint, *, is_own: bool = True) -> None:
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

    def _check_same_run(self, saved: Checkpoint) -> None:
        """Refuse to go on with settings under which the steps so far would have been others, or on other replicas.

        Raises:
            ConfigError: as `check_same_settings`, and where each replica had something of its own that this number of
                them cannot take over.
        """
        state: dict[str, Any] = saved.state
        check_same_settings(self._config, saved=state["config"], position=int(state["progress"]["position"]))
        before, reason = int(state["world_size"]), self._exchange.on_other_replicas
        if reason is not None and before != self._world_size:
            raise ConfigError(
                f"{saved.path} was saved by {before} replicas and there are {self._world_size}: with exchange.kind="
                f"{self._exchange.name} {reason}; go on with {before} replicas, or load the weights that "
                f"`dptrain export` writes in your task"
            )

    def _restore(self, saved: Checkpoint, log: RunLog) -> None:
        """Become what the saved run was when it was saved."""
        state: dict[str, Any] = saved.state
        for path, reason in saved.passed_over:
            log.note(f"passed over checkpoint {path}: {reason}")
        if saved.passed_over:
            log.note(f"{saved.steps_lost:,} steps are taken again for it")
        for change in self._identity.changes(state):
            log.note(change)
        self._identity.go_on(state)
        with _complete(saved):
            self._unpack(saved, rank=0 if self._exchange.parameters_are_equal else self._exchange.rank)
            self._unpack_exchange(saved)
            self._run.restore(state)
            self._hook.load_state_dict(state.get("hook", {}))
            if self._average is not None:
                self._average.restore(saved.tensors("average"), step=self._run.progress.step)
            self._flops.restore(state.get("flops", []))
            if self._loss_scale is not None and state.get("loss_scale") is not None:
                self._loss_scale.restore(state["loss_scale"])
        progress = self._run.progress
        log.note(f"resumed from step {progress.step:,}, {progress.position:,} samples seen")

    def _begin_as(self, other: Checkpoint, log: RunLog) -> None:
        """Begin a run of its own where another one was: with its parameters, optimizer and position, and no more."""
        state: dict[str, Any] = other.state
        if other.holds(member_name("model", 1)):
            raise ConfigError(
                f"{other.path} holds replicas with parameters of their own: branch from a run whose replicas are "
                f"equal, or load the weights that `dptrain export` writes in your task"
            )
        settings = [{**group, "params": None} for group in self._optimizer.param_groups]
        with _complete(other):
            self._unpack(other)
            for group, own in zip(self._optimizer.param_groups, settings, strict=True):
                group.update({**own, "params": group["params"]})
            position = int(state["progress"]["position"])
            self._exchange.replaced()
        if position >= given(self._config.max_samples):
            raise ConfigError(
                f"max_samples {self._config.max_samples} counts from the beginning of the run that is branched from, "
                f"which has seen {position} samples at {other.path}: give more"
            )
        self._run.begin_at(position)
        log.note(f"branched from {other.path}, {position:,} samples seen")

    def _unpack(self, checkpoint: Checkpoint, *, rank: int = 0) -> None:
        placed = self._exchange.placed
        unpack_model(self._model, checkpoint.tensors(member_name("model", rank)), placed=placed)
        unpack_optimizer(
            self._optimizer,
            names=self._names,
            tensors=checkpoint.tensors(member_name("optimizer", rank)),
            state=checkpoint.state["optimizer"],
            placed=placed,
        )
        if self._masters is not None:
            self._masters.restore(checkpoint.tensors("masters"))
        self._hook.load_tensors(checkpoint.tensors("hook") if checkpoint.holds("hook") else {})

    def _unpack_exchange(self, checkpoint: Checkpoint) -> None:
        plain = dict(cast("Mapping[str, Any]", checkpoint.state.get("exchange", {})))

        def record(rank: int) -> dict[str, Any]:
            name = member_name("exchange", rank)
            return plain | (checkpoint.tensors(name) if checkpoint.holds(name) else {})

        before = int(cast("int", checkpoint.state["world_size"]))
        if self._exchange.own_state and before != self._world_size:
            self._exchange.load_from_others([record(rank) for rank in range(before)])
        elif plain or checkpoint.holds("exchange"):
            self._exchange.load_state_dict(record(self._exchange.rank if self._exchange.own_state else 0))


@contextmanager
def _complete(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of a checkpoint that lacks something that it does."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} does not hold what this version needs: {error}") from error


def newest_checkpoint(run_dir: Path, *, allow_fresh: bool) -> Checkpoint | None:
    """Return the newest intact checkpoint of a run that is to go on, or None where it was ended before its first one.

    Raises:
        CheckpointError: as `load_newest`, and where the run had come to its end, so that there was one.
    """
    found = load_newest(checkpoints_in(run_dir), allow_fresh=allow_fresh)
    if found is None and not allow_fresh and (run_dir / "summary.json").exists():
        raise CheckpointError(
            f"the run in {run_dir} has come to its end, and its checkpoints are gone: bring them back, choose another "
            "--run-dir, or train all of it again, over its log, with --allow-fresh"
        )
    return found
