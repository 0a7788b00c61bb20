"""The trainer: puts the parts of a run together and says in which order things happen; the parts do the work."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from dptrain.data import MicroBatchLoader, SampleStream
from dptrain.errors import CheckpointError, ConfigError
from dptrain.observe import DdpTap, Meter, ParameterTap
from dptrain.observe.groups import Groups, resolve_groups
from dptrain.observe.silent_tap import SilentTap
from dptrain.observe.tap import Tap
from dptrain.tasks import Task, check_task, resolve_task
from dptrain.train.agreement import check_agreement, data_fingerprint
from dptrain.train.checkpoint import Checkpoint, load_checkpoint, load_newest, set_aside
from dptrain.train.config import (
    LogConfig,
    TrainConfig,
    as_saved,
    filled_in,
    given,
    largest_micro_batch_size,
    smoothing,
)
from dptrain.train.consensus import Result, StepRecord, Word, lost_peers_named, on_rank_0, told_by_rank_0
from dptrain.train.drift import DriftCheck
from dptrain.train.energy import EnergyCounter
from dptrain.train.evaluation import evaluate
from dptrain.train.keeper import Keeper, crosses
from dptrain.train.ledger import Ledger
from dptrain.train.manifest import JSON
from dptrain.train.meeting import collective_timeout_s
from dptrain.train.memory import find_micro_batch_size
from dptrain.train.metrics import Value
from dptrain.train.optimizer import NUM_STATES, build_optimizer, skips_on_device
from dptrain.train.peak import matmul_precision, peak_flops_per_s
from dptrain.train.pilot import Pilot
from dptrain.train.preemption import StopRequest
from dptrain.train.run_folder import RunFolder, check_same_settings, checkpoints_in, default_run_dir
from dptrain.train.run_log import RunLog, SilentLog, WritingLog
from dptrain.train.settings_file import settings_text
from dptrain.train.state import infinite_buffers, pack_model, pack_optimizer, unpack_model, unpack_optimizer
from dptrain.train.step import Stepper
from dptrain.train.watchdog import Watchdog
from dptrain.version import __version__


class Trainer:
    """Trains a task on all replicas of the process group, or in one process.

    Args:
        config: the settings.
        task: the task itself or the function that builds it, where it is not named in the settings.
        resume: go on from the newest checkpoint in the run folder; settings left open are those of the saved run.
        allow_fresh: begin anew where there are checkpoints to resume from and none can be trusted.

    Raises:
        ConfigError: where settings and task do not fit, before anything is trained.
        TaskError: where the task does not do what is needed of it.
        CheckpointError: where there are checkpoints to resume from and none can be trusted.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        task: Task | Callable[..., Task] | None = None,
        resume: bool = False,
        allow_fresh: bool = False,
    ) -> None:
        self._resume = resume
        self._allow_fresh = allow_fresh
        _check_device(config)
        self._accelerator = Accelerator(
            # Accelerate initialises gloo only when it is told to use the CPU; it does not see by itself that it must.
            cpu=config.device == "cpu" or not torch.cuda.is_available(),
            mixed_precision=config.precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=dt.timedelta(seconds=collective_timeout_s()))],
        )
        # A replica that fails in what follows must not tear the connections that another still makes.
        self._accelerator.wait_for_everyone()
        torch.manual_seed(config.seed)
        self._task = task if isinstance(task, Task) else resolve_task(task or config.task, options=config.task_options)
        check_task(self._task)
        self._run_dir = Path(config.run_dir or default_run_dir(config.task))
        folder = checkpoints_in(self._run_dir)
        self._saved = load_newest(folder, allow_fresh=allow_fresh) if resume else None
        if self._saved is not None:
            config = as_saved(config, saved=self._saved.state["config"])  # type: ignore[arg-type]
        if config.micro_batch_size == "auto":
            config = replace(config, micro_batch_size=self._fitting_micro_batch_size(config))
        self._config = filled_in(config, self._task.suggestion, world_size=self._world_size)
        # What a run branched off from is in its own checkpoints by then.
        begins = config.branch_from is not None and self._saved is None
        self._branch = load_checkpoint(Path(config.branch_from or "")) if begins else None
        self._fingerprint = data_fingerprint(self._task.train_data, seed=config.seed)
        self._check_agreement()

        self._bare_model = self._task.model
        self._model = self._accelerator.prepare(self._bare_model)
        self._optimizer = build_optimizer(self._config.optimizer, self._bare_model)
        groups = resolve_groups("module" if self._config.noise.groups else None, model=self._bare_model)
        self._meter = Meter(
            self._bare_model.parameters(),
            tap=self._tap(groups),
            groups=groups,
            smoothing=smoothing(self._config),
            level=self._config.noise.level,
            population=self._num_samples,
        )
        self._stream = SampleStream(self._num_samples, seed=self._config.seed)
        self._energy = EnergyCounter(self._accelerator.device)
        self._pilot = Pilot(
            self._config,
            meter=self._meter,
            world_size=self._world_size,
            stream=self._stream,
            ledger=self._ledger(),
        )

    @property
    def is_main(self) -> bool:
        """Whether this replica writes the run folder."""
        return bool(self._accelerator.is_main_process)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self._run_dir

    @property
    def _world_size(self) -> int:
        return int(self._accelerator.num_processes)

    @property
    def _num_samples(self) -> int:
        return len(self._task.train_data)  # type: ignore[arg-type]

    def _ledger(self) -> Ledger:
        device = self._accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        precision = matmul_precision(device, mixed_precision=self._config.precision)
        return Ledger(
            world_size=self._world_size,
            peak_flops_per_s=peak_flops_per_s(name, precision=precision),
            price_per_device_hour=self._config.log.price_per_device_hour,
        )

    def _tap(self, groups: Groups) -> Tap:
        if self._config.control.mode == "off":
            return SilentTap(self._accelerator.device, num_entries=groups.num_entries)
        if self._config.noise.observer == "parameters":
            return ParameterTap(self._bare_model.parameters(), groups=groups)
        if self._world_size == 1:  # which may be wrapped all the same
            raise ConfigError("noise.observer=hook needs at least two replicas: use noise.observer=parameters")
        return DdpTap(self._model, groups=groups)

    def _fitting_micro_batch_size(self, config: TrainConfig) -> int:
        """Find by trying what fits into the memory of all GPUs. Without one the task's size will do: hosts swap."""
        suggestion, device = self._task.suggestion, self._accelerator.device
        on_host = device.type == "cpu"
        return find_micro_batch_size(
            self._task,
            largest=suggestion.micro_batch_size if on_host else self._num_samples,
            device=device,
            num_states=NUM_STATES[config.optimizer.name],
            precision=self._accelerator.autocast,
        )

    def _check_agreement(self) -> None:
        check_agreement(
            {
                "the settings": settings_text(replace(self._config, run_dir=None, log=LogConfig())),
                "the version of dptrain": __version__,
                "the version of torch": torch.__version__,
                "the number of samples": self._num_samples,
                "the data": self._fingerprint,
                "the checkpoint to branch from": None if self._branch is None else self._branch.step,
                "the checkpoint to resume from": None if self._saved is None else self._saved.step,
            },
            device=self._accelerator.device,
        )

    # The run

    def run(self) -> Mapping[str, Value] | None:
        """Train to the end.

        Returns:
            The summary, or None where the run was asked to stop and can be resumed.

        Raises:
            PeerLostError: where another replica ended or hung.
            DesyncError: where the replicas are no longer at the same step, or no longer the same.
            DivergedError: where too many steps in a row had to be skipped.
            CheckpointError: where the run cannot be saved.
        """
        saved = self._saved
        if saved is not None:  # before the log is opened, which writes the settings and cuts rows
            check_same_settings(self._config, saved=saved.state["config"])  # type: ignore[arg-type]
        for checkpoint in (saved, self._branch):
            if checkpoint is not None:
                self._check_same_data(checkpoint)
        log = self._open_log(saved)
        with ExitStack() as stack:
            stack.callback(log.close)
            stack.callback(self._meter.remove, wait=False)  # its sums travel with those of the step
            if saved is not None:
                self._restore(saved, log)
            elif self._branch is not None:
                self._begin_as(self._branch, log)
            self._follow_record(log)
            if not skips_on_device(self._optimizer):
                log.note("this optimizer cannot skip a step on the device: each step waits for it once")
            keeper = self._on_rank_0(lambda: self._keeper(log))
            if keeper is not None:
                stack.callback(keeper.close)
            loader = stack.enter_context(self._loader())
            stop = stack.enter_context(StopRequest())
            stack.enter_context(lost_peers_named(lambda: self._pilot.progress.step))
            return self._train(self._stepper(loader), stop, keeper, log)

    def _follow_record(self, log: RunLog) -> None:
        """Have all replicas take the decisions that an earlier attempt had acted upon, up to the end of its log."""
        told = told_by_rank_0([value for pair in log.on_record for value in pair], device=self._accelerator.device)
        if told:
            *decisions, (up_to, _) = zip(told[::2], told[1::2], strict=True)
            self._pilot.follow(dict(decisions), up_to=up_to)

    def _train(
        self, stepper: Stepper, stop: StopRequest, keeper: Keeper | None, log: RunLog
    ) -> Mapping[str, Value] | None:
        pilot, began_s = self._pilot, time.monotonic() - self._pilot.progress.wall_s
        drift = DriftCheck(self._bare_model.named_parameters(), every_steps=self._config.drift_check_every_steps)
        with Watchdog(world_size=self._world_size) as watchdog:
            while not (pilot.at_end or pilot.stop_agreed):
                record = pilot.next_record(wall_s=time.monotonic() - began_s)
                word = self._word(stepper, stop, keeper)
                with self._told_where(record):
                    pending = stepper.step(record, word=word)
                # What the step before taught is read only now, while the device works on this one.
                pilot.read_outcome(log)
                pilot.decide(log)
                drift.finish()
                flops = stepper.take_flops_per_sample()
                pilot.sent(record, pending, flops_per_sample=flops, wall_s=time.monotonic() - began_s)
                drift.start(record.step)
                watchdog.beat()
                if self._pause(record, keeper, log):
                    pilot.paused(wall_s=time.monotonic() - began_s)
                    watchdog.beat()
            drift.finish()
        if not pilot.at_end:
            log.note(
                f"stopped on request after step {pilot.progress.step:,}: go on with --run_dir {self._run_dir} --resume"
            )
            return None
        summary = self._summary()
        log.finish(summary)
        return summary

    @contextmanager
    def _told_where(self, record: StepRecord) -> Iterator[None]:
        """Add the step and its samples to whatever the task raises."""
        try:
            yield
        except Exception as error:
            samples = self._pilot.samples_of(record, rank=self._accelerator.process_index)
            error.add_note(f"in step {record.step:,}, {samples}")
            raise

    def _word(self, stepper: Stepper, stop: StopRequest, keeper: Keeper | None) -> Word:
        busy_s = stepper.take_busy_s()
        self._pilot.stragglers.note(busy_s)
        return Word(
            stop=stop.requested,
            save=stop.take_save(),
            failed_saves=0 if keeper is None else keeper.failed_saves(),
            slowness=self._pilot.stragglers.slowness,
            busy_s=busy_s,
            step_s=self._pilot.tempo.lap_s,
            energy_j=self._energy.take_j(),
        )

    def _pause(self, record: StepRecord, keeper: Keeper | None, log: RunLog) -> bool:
        """Evaluate and save after a step, whichever is due; both at the end of the run. Return whether any was.

        Both rest on the outcome of the step. To read it earlier than usual changes no decision: that is taken after
        the next step all the same.
        """
        pilot = self._pilot
        evaluates = pilot.at_end or crosses(record, given(self._config.log.eval_every_samples))
        ends = pilot.at_end or pilot.stop_agreed
        saves = keeper is not None and (pilot.take_save() or keeper.is_due(record))
        if not (evaluates or ends or saves):
            return False
        pilot.read_outcome(log)
        if evaluates:
            self._evaluate(log)
        if ends:
            self._on_rank_0(lambda: None if keeper is None else keeper.save_and_wait())
        elif keeper is not None and saves:
            keeper.save()
        return True

    def _evaluate(self, log: RunLog) -> None:
        if self._task.eval_data is None:
            return
        loss = evaluate(
            self._bare_model,
            self._task.eval_data,
            self._task.loss,
            micro_batch_size=largest_micro_batch_size(self._config),
            collate=self._task.collate,
            rank=self._accelerator.process_index,
            world_size=self._world_size,
            device=self._accelerator.device,
        )
        self._pilot.evaluated(loss)
        log.evaluation(
            {
                "kind": "eval",
                "step": self._pilot.progress.step,
                "progress/samples": self._pilot.progress.position,
                "eval/loss": loss,
                **{f"eval/{name}": figure(loss) for name, figure in self._task.eval_metrics.items()},
            }
        )

    def _summary(self) -> dict[str, Value]:
        loss = self._pilot.progress.eval_loss
        metrics = {} if loss is None else {name: figure(loss) for name, figure in self._task.eval_metrics.items()}
        return {
            "task": self._task.name,
            "world_size": self._world_size,
            "backend": str(dist.get_backend()) if dist.is_initialized() else "none",
            "device": str(self._accelerator.device.type),
            **self._pilot.figures(),
            "bits_per_byte": None,
            **metrics,
        }

    # Parts

    def _open_log(self, saved: Checkpoint | None) -> RunLog:
        return self._on_rank_0(lambda: self._writing_log(saved)) or SilentLog()

    def _writing_log(self, saved: Checkpoint | None) -> RunLog:
        folder = RunFolder(self._run_dir, resume=self._resume)
        if saved is None and self._allow_fresh:
            set_aside(checkpoints_in(self._run_dir))
        replicas = "replica" if self._world_size == 1 else "replicas"
        title = f"{self._task.name} on {self._world_size} {self._accelerator.device.type} {replicas} → {self._run_dir}"
        return WritingLog(folder, config=self._config, up_to_step=0 if saved is None else saved.step, title=title)

    def _loader(self) -> MicroBatchLoader:
        return MicroBatchLoader(
            self._task.train_data,
            stream=self._stream,
            rank=self._accelerator.process_index,
            world_size=self._world_size,
            num_workers=self._config.num_workers,
            collate=self._task.collate,
            pin_memory=self._accelerator.device.type == "cuda",
        )

    def _stepper(self, loader: MicroBatchLoader) -> Stepper:
        self._model.train()
        return Stepper(
            accelerator=self._accelerator,
            model=self._model,
            loss=self._task.loss,
            optimizer=self._optimizer,
            meter=self._meter,
            loader=loader,
            max_grad_norm=self._config.optimizer.max_grad_norm,
            seed_of=lambda position: forward_seed(self._config.seed, position),
        )

    # Checkpoints

    def _keeper(self, log: RunLog) -> Keeper:
        return Keeper(
            self._config.checkpoint,
            folder=checkpoints_in(self._run_dir),
            pack=self._pack,
            infinite=infinite_buffers(self._bare_model),
            committed_step=0 if self._saved is None else self._saved.step,
            log=log,
        )

    def _pack(self) -> tuple[int, tuple[Mapping[str, Mapping[str, torch.Tensor]], Mapping[str, JSON]]]:
        """Return the step, and the tensors and the state that a checkpoint of this moment holds."""
        optimizer_tensors, optimizer_state = pack_optimizer(self._optimizer, names=self._names())
        state: dict[str, JSON] = {
            "config": asdict(self._config),
            "world_size": self._world_size,
            "num_samples": self._num_samples,
            "data": self._fingerprint,
            "optimizer": optimizer_state,
            **self._pilot.state(),
        }
        tensors = {"model": pack_model(self._bare_model), "optimizer": optimizer_tensors}
        return self._pilot.progress.step, (tensors, state)

    def _check_same_data(self, saved: Checkpoint) -> None:
        """Refuse a checkpoint from which this data would go on in another order, or with other samples."""
        state: dict[str, Any] = saved.state
        if state["num_samples"] != self._num_samples:
            raise ConfigError(
                f"the data set had {state['num_samples']} samples when {saved.path} was saved and has "
                f"{self._num_samples} now: the order of samples would be another one"
            )
        if state["data"] != self._fingerprint:
            raise ConfigError(
                f"the data set is another one than when {saved.path} was saved: some of its samples have changed"
            )

    def _restore(self, saved: Checkpoint, log: RunLog) -> None:
        """Become what the saved run was when it was saved."""
        state: dict[str, Any] = saved.state
        for path, reason in saved.passed_over:
            log.note(f"passed over checkpoint {path}: {reason}")
        if saved.passed_over:
            log.note(f"{saved.steps_lost:,} steps are taken again for it")
        with _complete(saved):
            self._unpack(saved)
            self._pilot.restore(state)
        progress = self._pilot.progress
        log.note(f"resumed from step {progress.step:,}, {progress.position:,} samples seen")

    def _begin_as(self, other: Checkpoint, log: RunLog) -> None:
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
        self._pilot.begin_at(position)
        log.note(f"branched from {other.path}, {position:,} samples seen")

    def _unpack(self, checkpoint: Checkpoint) -> None:
        unpack_model(self._bare_model, checkpoint.tensors("model"))
        unpack_optimizer(
            self._optimizer,
            names=self._names(),
            tensors=checkpoint.tensors("optimizer"),
            state=checkpoint.state["optimizer"],
        )

    def _on_rank_0(self, action: Callable[[], Result]) -> Result | None:
        return on_rank_0(action, rank=self._accelerator.process_index, device=self._accelerator.device)

    def _names(self) -> dict[torch.nn.Parameter, str]:
        return {parameter: name for name, parameter in self._bare_model.named_parameters()}


@contextmanager
def _complete(checkpoint: Checkpoint) -> Iterator[None]:
    """Say of a checkpoint that lacks something that it does."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint.path} does not hold what this version needs: {error}") from error


def _check_device(config: TrainConfig) -> None:
    """Refuse GPUs that are not there, in place of what accelerate and CUDA would say."""
    if config.device == "cpu":
        return
    num_gpus, num_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if config.device == "cuda" and num_gpus == 0:
        raise ConfigError("device is cuda, but torch finds no GPU: use device=auto or device=cpu")
    if 0 < num_gpus < num_here:
        raise ConfigError(
            f"there are {num_here} replicas on this node, but {num_gpus} GPUs: start {num_gpus} replicas, or use "
            f"device=cpu"
        )


def forward_seed(seed: int, position: int) -> int:
    """Return the seed of the forward pass on the micro-batch that begins at `position`.

    Dropout and the like depend on the position in the stream, and so not on restarts, and not on which replica runs
    the micro-batch.
    """
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
