"""The trainer: puts the parts of a run together and says in which order things happen; the parts do the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch.distributed as dist

from dptrain.checkpoint.opened import Checkpoint
from dptrain.checkpoint.state import infinite_buffers
from dptrain.checkpoint.store import load_checkpoint, set_aside
from dptrain.config.filled_in import as_saved, filled_in
from dptrain.config.train_config import TrainConfig
from dptrain.cost.energy import EnergyCounter
from dptrain.cost.flops import FlopCounter
from dptrain.data import MicroBatchLoader
from dptrain.data.source import seed_everything
from dptrain.exchange import RunningStatistics
from dptrain.runtime.garbage import GarbageCollection
from dptrain.runtime.hosts.shared_folder import check_resumable, check_shared_folder
from dptrain.runtime.hosts.task_identity import TaskIdentity
from dptrain.runtime.launcher import is_replica
from dptrain.runtime.rendezvous import rendezvous
from dptrain.runtime.replica import num_replicas, rank_of_replica, replica_device, wait_for_everyone
from dptrain.runtime.signals import SignalHandler
from dptrain.runtime.startup_check import check_device
from dptrain.runtime.step_reduction import (
    RankReport,
    Result,
    StepRecord,
    broadcast_from_rank_0,
    on_rank_0,
    summed,
    translate_peer_errors,
)
from dptrain.runtime.watchdog import Watchdog
from dptrain.tasks import Task, fewest_samples
from dptrain.tracking.jsonl import Value
from dptrain.tracking.run_folder import RunFolder, checkpoints_in, default_run_dir
from dptrain.tracking.run_log import RunLog, SilentLog, WritingLog
from dptrain.train.checkpoint_schedule import CheckpointManager, crosses, save_on_all
from dptrain.train.evaluation import HeldOut
from dptrain.train.execution.exchanging import prepare_exchange, shared_loss
from dptrain.train.execution.loss_scale import LossScale
from dptrain.train.execution.master_weights import MasterWeights, needs_masters
from dptrain.train.execution.wrapping import forward_precision, is_sharded, wrap
from dptrain.train.facts import facts_of
from dptrain.train.hooks import build_hooks, wants_end
from dptrain.train.optimizer import build_optimizer, skips_on_device
from dptrain.train.parts import (
    build_ledger,
    build_meter,
    build_replica_check,
    build_update,
    fitting_micro_batch_size,
    sharding,
)
from dptrain.train.preparation import check_same_training, prepared, requested
from dptrain.train.preparation.weights import read_weights
from dptrain.train.run_progress import RunProgress
from dptrain.train.run_state import RunState, newest_checkpoint
from dptrain.train.step import Stepper, seed_forward


class Trainer:
    """Trains a task on all replicas of the process group, or in one process.

    Args:
        config: the settings.
        task: the task itself or the function that builds it, where it is not named in the settings.
        resume: go on from the newest checkpoint in the run folder; settings left open are those of the saved run.
        allow_fresh: begin anew where there are checkpoints to resume from and none can be trusted.
        launch: what tells this launch from others, for its next attempt; see `RunFolder`.

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
        launch: Sequence[int] = (),
    ) -> None:
        self._resume, self._allow_fresh, self._launch = resume, allow_fresh, launch
        check_device(config)
        self._device = replica_device(config)
        if is_replica():
            rendezvous(device=config.device, share_devices=config.execution.share_devices)
        self._rank, self._world_size = rank_of_replica(), num_replicas()
        self._is_main = self._rank == 0
        wait_for_everyone(self._device)  # one that fails in what follows must not tear connections still being made
        seed_everything(config.seed)  # a split that the task draws is then the same on all replicas, and on resume
        self._task, config = requested(task, config)
        self._run_dir = Path(config.run_dir or default_run_dir(config.task))
        if resume:
            check_resumable(self._run_dir, device=self._device)
        self._saved = newest_checkpoint(self._run_dir, allow_fresh=allow_fresh) if resume else None
        if self._saved is not None:
            config = as_saved(config, saved=self._saved.state["config"])  # type: ignore[arg-type]
        self._task, self._loss = prepared(self._task, config, is_resumed=self._saved is not None)
        self._statistics = RunningStatistics(
            self._task.model, rank=self._rank, world_size=self._world_size, fewest_samples=fewest_samples(self._task)
        )
        if config.micro_batch_size == "auto":
            smallest = self._statistics.smallest_micro_batch
            found = fitting_micro_batch_size(self._task, config, smallest=smallest, device=self._device)
            config = replace(config, micro_batch_size=found)
        self._config = filled_in(config, self._task.suggestion, world_size=self._world_size)
        begins = config.branch_from is not None and self._saved is None  # later it is in the run's own checkpoints
        self._branch = load_checkpoint(Path(config.branch_from or "")) if begins else None
        self._stream = self._task.order(seed=self._config.seed)
        self._identity = TaskIdentity(self._task, stream=self._stream)
        check_same_training(
            self._config,
            self._task,
            identity=self._identity,
            loss=self._loss,
            branch=self._branch,
            saved=self._saved,
            device=self._device,
        )

        model = self._bare_model = self._task.model
        read = read_weights if self._saved is None else None
        self._exchange = prepare_exchange(self._config, model, statistics=self._statistics, task=task, read=read)
        execution, precision = self._config.execution, self._config.precision
        looks = self._config.find_unused_parameters
        self._masters = MasterWeights(self._bare_model) if needs_masters(self._config) else None
        self._model = wrap(
            self._bare_model,
            exchange=self._exchange,
            execution=execution,
            precision=precision,
            device=self._device,
            find_unused_parameters=bool(self._loss.unused) if looks is None else looks,
        )
        self._optimizer = build_optimizer(
            self._config.optimizer, self._bare_model, parameter_groups=self._task.parameter_groups
        )
        if self._masters is not None:
            self._masters.take_over(self._optimizer, device=self._device)
        self._loss_scale = LossScale(self._device) if precision == "fp16" else None
        self._is_sharded = is_sharded(self._bare_model)
        self._autocast = forward_precision(self._bare_model, device=self._device, precision=precision)
        self._hook, average = build_hooks(
            self._config, self._task, model=self._bare_model, optimizer=self._optimizer, masters=self._masters
        )
        self._held_out = HeldOut(
            self._task,
            self._bare_model,
            average=average,
            exchange=self._exchange,
            rank=self._rank,
            world_size=self._world_size,
            device=self._device,
            precision=self._autocast,
        )
        self._meter = build_meter(
            self._config,
            model=self._model,
            bare_model=self._bare_model,
            device=self._device,
            loss_scale=self._loss_scale,
            exchange=self._exchange,
            population=self._num_samples,
        )
        self._flops = FlopCounter(self._bare_model)
        self._energy = EnergyCounter(self._device)
        self._run = RunProgress(
            self._config,
            meter=self._meter,
            world_size=self._world_size,
            stream=self._stream,
            ledger=build_ledger(self._config, task=self._task, device=self._device),
            bytes_per_step=self._exchange.bytes_per_step,
            smallest_micro_batch=self._statistics.smallest_micro_batch,
            tokens_per_sample=self._task.tokens_per_sample,
        )
        self._state = RunState(
            self._config,
            model=self._bare_model,
            optimizer=self._optimizer,
            exchange=self._exchange,
            run=self._run,
            num_samples=self._num_samples,
            identity=self._identity,
            world_size=self._world_size,
            hook=self._hook,
            average=average,
            masters=self._masters,
            loss_scale=self._loss_scale,
            flops=self._flops,
        )

    @property
    def is_main(self) -> bool:
        """Whether this replica writes the run folder; also when the process group is gone."""
        return self._is_main

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self._run_dir

    @property
    def _num_samples(self) -> int:
        return len(self._task.train_data)  # type: ignore[arg-type]

    # The run

    def run(self) -> Mapping[str, Value] | None:
        """Train to the end; raises as `steps` does.

        Returns:
            The summary, or None where the run was asked to stop and can be resumed.
        """
        steps = self.steps()
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return cast("Mapping[str, Value] | None", end.value)

    def steps(self) -> Generator[StepRecord, None, Mapping[str, Value] | None]:
        """Train to the end, and hand over after each optimizer step, for who has something else to do in between.

        Returns:
            As `run`.

        Raises:
            PeerLostError: where another replica ended or hung.
            DesyncError: where the replicas are no longer at the same step, or no longer the same.
            DivergedError: where too many steps in a row had to be skipped.
            CheckpointError: where the run cannot be saved.
        """
        saved = self._saved
        self._state.check(saved, self._branch)  # before the log is opened, which writes the settings and cuts rows
        log = self._on_rank_0(lambda: self._writing_log(saved)) or SilentLog()
        with ExitStack() as stack:
            stack.callback(log.close)
            check_shared_folder(self._run_dir, device=self._device)
            stack.callback(self._meter.remove, wait=False)  # its sums travel with those of the step
            self._state.begin(saved, self._branch, log)
            self._follow_record(log)
            if not skips_on_device(self._optimizer):
                log.note("this optimizer cannot skip a step on the device: each step waits for it once")
            checkpoint_manager = self._on_rank_0(lambda: self._checkpoint_manager(log))
            if self._is_sharded and not self._is_main:
                checkpoint_manager = self._checkpoint_manager(log)
            if checkpoint_manager is not None:
                stack.callback(checkpoint_manager.close)
            loader = stack.enter_context(self._loader())
            stop = stack.enter_context(SignalHandler())
            stack.enter_context(translate_peer_errors(lambda: self._run.progress.step))
            return (yield from self._train(self._stepper(loader), stop, checkpoint_manager, log))

    def _follow_record(self, log: RunLog) -> None:
        """Have all replicas take the decisions that an earlier attempt had acted upon, up to the end of its log."""
        known = broadcast_from_rank_0([value for pair in log.on_record for value in pair], device=self._device)
        if known:
            *decisions, (up_to, _) = zip(known[::2], known[1::2], strict=True)
            self._run.follow(dict(decisions), up_to=up_to)

    def _train(
        self, stepper: Stepper, stop: SignalHandler, checkpoint_manager: CheckpointManager | None, log: RunLog
    ) -> Generator[StepRecord, None, Mapping[str, Value] | None]:
        run, began_s = self._run, time.monotonic() - self._run.progress.wall_s
        self._drift = drift = build_replica_check(
            self._config, self._bare_model, statistics=self._statistics, exchange=self._exchange
        )
        garbage = GarbageCollection(self._config.execution.collect_garbage_every_steps)
        with Watchdog(world_size=self._world_size) as watchdog, garbage.held():
            while not (run.at_end or run.stop_agreed):
                record = run.next_record(wall_s=time.monotonic() - began_s)
                report = self._report(stepper, stop, checkpoint_manager)
                with run.located(record, rank=self._rank):
                    pending = stepper.step(record, report=report)
                # What the step before taught is read only now, while the device works on this one.
                run.read_outcome(log)
                run.decide(log)
                drift.finish()
                flops = stepper.take_flops_per_sample()
                wall_s = time.monotonic() - began_s
                run.sent(record, pending, flops_per_sample=flops, wall_s=wall_s, parts=stepper.parts)
                self._hook.on_step(run.moment(self._bare_model))
                drift.start(record.step)
                garbage.stepped(record.step)
                watchdog.beat()
                if self._pause(record, checkpoint_manager, log, beat=watchdog.beat):
                    run.paused(wall_s=time.monotonic() - began_s)
                    watchdog.beat()
                yield record
            drift.finish()
        if not run.at_end:
            log.note(
                f"stopped on request after step {run.progress.step:,}: continue with --run-dir {self._run_dir} --resume"
            )
            return None
        summary = self._summary()
        log.finish(summary)
        return summary

    def _report(
        self, stepper: Stepper, stop: SignalHandler, checkpoint_manager: CheckpointManager | None
    ) -> RankReport:
        busy_s = stepper.take_busy_s()
        self._run.stragglers.note(busy_s)
        return RankReport(
            stop=stop.requested,
            # All compare themselves before one is saved, and rank 0 alone has a clock for it.
            save=stop.take_save() or (checkpoint_manager is not None and checkpoint_manager.is_due()),
            failed_saves=0 if checkpoint_manager is None else checkpoint_manager.failed_saves(),
            folder_removed=checkpoint_manager is not None and checkpoint_manager.folder_removed(),
            slowness=self._run.stragglers.slowness,
            busy_s=busy_s,
            step_s=self._run.step_timer.interval_s,
            energy_j=self._energy.take_j(),
        )

    def _pause(
        self, record: StepRecord, checkpoint_manager: CheckpointManager | None, log: RunLog, *, beat: Callable[[], None]
    ) -> bool:
        """Evaluate and save after a step, whichever is due; both at the end of the run. Return whether any was.

        Both rest on the outcome of the step. To read it earlier than usual changes no decision: that is taken after
        the next step all the same.
        """
        run = self._run
        evaluates = run.at_end or crosses(record, self._config.log.eval_every_samples)
        ends = run.at_end or run.stop_agreed
        saves = run.take_save() or crosses(record, self._config.checkpoint.every_samples)
        if not (evaluates or ends or saves):
            return False
        run.read_outcome(log)
        if evaluates:
            self._evaluate(log, beat=beat)
            ends = ends or run.at_end
        if ends or saves:
            self._drift.check(record.step)
            if ends:  # what the last step and the evaluation drew; the report of a step is of what was before it
                run.spent(energy_j=summed(self._energy.take_j(at_once=True), device=self._device))
            join = self._state.pack if self._state.takes_all else None  # rank 0 alone keeps what comes of it
            save_on_all(checkpoint_manager, is_last=ends, join=join, beat=beat, rank=self._rank, device=self._device)
        return True

    def _evaluate(self, log: RunLog, *, beat: Callable[[], None]) -> None:
        run = self._run
        figures = self._held_out.figures(batch_size=run.largest_micro_batch_size, beat=beat)
        if not figures:
            return
        run.evaluated(figures)
        log.evaluation(
            {
                "kind": "eval",
                "step": run.progress.step,
                "progress/samples": run.progress.position,
                **{f"eval/{name}": value for name, value in figures.items()},
            }
        )
        ends = wants_end(self._hook, run.moment(self._bare_model), figures, device=self._device)
        if ends and not run.at_end:
            run.end_early()
            log.note(f"ended early after step {run.progress.step:,}, as a hook or early stopping asked for")

    def _summary(self) -> dict[str, Value]:
        return {
            "task": self._task.name,
            "world_size": self._world_size,
            "backend": str(dist.get_backend()) if dist.is_initialized() else "none",
            "device": str(self._device.type),
            **self._run.figures(),
        }

    # Parts

    def _writing_log(self, saved: Checkpoint | None) -> RunLog:
        folder = RunFolder(self._run_dir, resume=self._resume, launch=self._launch)
        if saved is None and self._allow_fresh:
            set_aside(checkpoints_in(self._run_dir))
        facts = facts_of(
            self._task,
            num_samples=self._num_samples,
            exchange=self._exchange,
            device=self._device,
            saved=saved,
            branch=self._branch,
        )
        return WritingLog(folder, config=self._config, up_to_step=0 if saved is None else saved.step, facts=facts)

    def _loader(self) -> MicroBatchLoader:
        return MicroBatchLoader(
            self._task.train_data,
            stream=self._stream,
            rank=self._rank,
            world_size=self._world_size,
            num_workers=self._config.num_workers,
            collate=self._task.collate,
            pin_memory=self._device.type == "cuda",
            filler_size=self._statistics.smallest_micro_batch,
        )

    def _stepper(self, loader: MicroBatchLoader) -> Stepper:
        self._model.train()
        draws = self._loss.draws_beside_torch
        seed = partial(seed_forward, self._config.seed, device=self._device, beside_torch=draws)
        shared = shared_loss(self._task, self._config, device=self._device, precision=self._autocast, seed_forward=seed)
        self._exchange.share(shared)
        update = build_update(
            self._config, self._model, optimizer=self._optimizer, loss_scale=self._loss_scale, masters=self._masters
        )
        return Stepper(
            model=self._model,
            loss=self._task.loss,
            exchange=self._exchange,
            update=update,
            meter=self._meter,
            loader=loader,
            statistics=self._statistics,
            device=self._device,
            precision=self._autocast,
            flops=self._flops,
            seed_forward=seed,
        )

    def _checkpoint_manager(self, log: RunLog) -> CheckpointManager:
        return CheckpointManager(
            self._config.checkpoint,
            folder=checkpoints_in(self._run_dir),
            pack=self._state.pack,
            infinite=self._state.of_all_models(infinite_buffers(self._bare_model)),
            committed_step=0 if self._saved is None else self._saved.step,
            log=log,
            sharding=sharding(self._device) if self._is_sharded else None,
        )

    def _on_rank_0(self, action: Callable[[], Result]) -> Result | None:
        return on_rank_0(action, rank=self._rank, device=self._device)
