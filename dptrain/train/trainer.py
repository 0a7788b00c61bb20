"""The trainer: what is trained, in which order things happen, and what is kept; one step's algorithm is in `step`."""

from __future__ import annotations

import datetime as dt
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from dptrain.control import RULES, Measurement, State, state_to_json
from dptrain.data import MicroBatchLoader, SampleStream
from dptrain.errors import CheckpointError, ConfigError
from dptrain.noise import NoiseScale
from dptrain.observe import DdpTap, Meter, ParameterTap, PendingSum
from dptrain.observe.tap import Tap
from dptrain.tasks import Task, check_task, resolve_task
from dptrain.train.checkpoint import Checkpoint, load_newest, save_checkpoint
from dptrain.train.config import (
    TrainConfig,
    controller,
    filled_in,
    given,
    learning_rate_schedule,
    plan,
    smoothing,
)
from dptrain.train.consensus import Result, StepOutcome, StepRecord, on_rank_0, receive
from dptrain.train.evaluation import evaluate
from dptrain.train.manifest import JSON
from dptrain.train.metrics import Value
from dptrain.train.optimizer import build_optimizer, skips_on_device
from dptrain.train.preemption import StopRequest
from dptrain.train.run_folder import RunFolder, check_same_settings, checkpoints_in, default_run_dir
from dptrain.train.run_log import RunLog, SilentLog, WritingLog, noise_columns
from dptrain.train.state import pack_model, pack_optimizer, unpack_model, unpack_optimizer
from dptrain.train.step import Stepper

# Longest wait for a peer, in a collective: a replica that hangs must not hold the others for torch's half hour.
_TIMEOUT = dt.timedelta(seconds=300)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, apart from model, optimizer, meter and controller. Exactly this is in a checkpoint.

    Attributes:
        step: optimizer steps done.
        position: samples seen.
        global_batch_size: for the next step.
        learning_rate_factor: of the rule, for the next step.
        steps_dropped: updates skipped for a gradient that was not finite.
        num_batch_changes: how often the batch changed.
        loss_first: of the first step.
        loss_last: of the latest step whose outcome is known.
        eval_loss: latest held-out loss.
        wall_s: seconds of training, earlier attempts included.
    """

    step: int = 0
    position: int = 0
    global_batch_size: int
    learning_rate_factor: float
    steps_dropped: int = 0
    num_batch_changes: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    eval_loss: float | None = None
    wall_s: float = 0.0


class Trainer:
    """Trains a task on all replicas of the process group, or in one process.

    Args:
        config: the settings.
        task: the task itself or the function that builds it, where it is not named in the settings.
        resume: go on from the newest checkpoint in the run folder.

    Raises:
        ConfigError: where settings and task do not fit, before anything is trained.
        TaskError: where the task does not do what is needed of it.
    """

    def __init__(
        self, config: TrainConfig, *, task: Task | Callable[..., Task] | None = None, resume: bool = False
    ) -> None:
        self._resume = resume
        self._accelerator = Accelerator(
            # Accelerate initialises gloo only when it is told to use the CPU; it does not see by itself that it must.
            cpu=config.device == "cpu" or not torch.cuda.is_available(),
            mixed_precision=config.precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
        )
        # A replica that fails in what follows must not tear the connections that another still makes.
        self._accelerator.wait_for_everyone()
        torch.manual_seed(config.seed)
        self._task = task if isinstance(task, Task) else resolve_task(task or config.task, options=config.task_options)
        check_task(self._task)
        self._config = filled_in(config, self._task.suggestion, world_size=self._world_size)
        self._controller = controller(self._config, world_size=self._world_size)
        self._schedule = learning_rate_schedule(self._config)
        self._rule = RULES[self._config.optimizer.rule]
        self._run_dir = Path(config.run_dir or default_run_dir(config.task))

        self._bare_model = self._task.model
        self._model = self._accelerator.prepare(self._bare_model)
        self._optimizer = build_optimizer(self._config.optimizer, self._bare_model)
        self._meter = Meter(
            self._bare_model.parameters(),
            tap=self._tap(),
            smoothing=smoothing(self._config),
            level=self._config.noise.level,
            population=self._num_samples,
        )
        self._control_state: State = self._controller.init()
        batch = given(self._config.global_batch_size)
        self._progress = Progress(
            global_batch_size=batch, learning_rate_factor=self._learning_rate_factor(self._meter.read(), batch)
        )
        self._unread: tuple[StepRecord, PendingSum] | None = None
        self._undecided: StepRecord | None = None
        self._stop_agreed = False
        self._logged = (0, 0.0)  # position and seconds of the last row, for the throughput

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

    def _tap(self) -> Tap:
        if self._config.noise.observer == "parameters":
            return ParameterTap(self._bare_model.parameters())
        if self._model is self._bare_model:
            raise ConfigError("noise.observer=hook needs at least two replicas: use noise.observer=parameters")
        return DdpTap(self._model)

    # The run

    def run(self) -> Mapping[str, Value] | None:
        """Train to the end.

        Returns:
            The summary, or None where the run was asked to stop and can be resumed.
        """
        saved = load_newest(checkpoints_in(self._run_dir)) if self._resume else None
        log = self._open_log(saved)
        try:
            if saved is not None:
                self._restore(saved, log)
            if not skips_on_device(self._optimizer):
                log.note("this optimizer cannot skip a step on the device: each step waits for it once")
            with self._loader() as loader, StopRequest() as stop:
                return self._train(self._stepper(loader), stop, log)
        finally:
            self._meter.remove()
            log.close()

    def _train(self, stepper: Stepper, stop: StopRequest, log: RunLog) -> Mapping[str, Value] | None:
        began_s = time.monotonic() - self._progress.wall_s
        max_samples = given(self._config.max_samples)
        while self._progress.position < max_samples and not self._stop_agreed:
            record = self._next_record(wall_s=time.monotonic() - began_s)
            pending = stepper.step(record, stop=stop.requested)
            # What the step before taught is read only now, while the device works on this one.
            self._read_outcome(log)
            self._decide(log)
            self._unread = (record, pending)
            self._progress = replace(
                self._progress, step=record.step, position=record.end, wall_s=time.monotonic() - began_s
            )
            if record.end >= max_samples or self._stop_agreed or self._is_due(record):
                # Reading earlier than usual changes no decision: it is taken after the next step all the same.
                self._read_outcome(log)
                self._pause(record, log)
                self._logged = (record.end, time.monotonic() - began_s)
        if self._progress.position < max_samples:
            log.note(
                f"stopped on request after step {self._progress.step:,}: go on with --run_dir {self._run_dir} --resume"
            )
            return None
        summary = self._summary()
        log.finish(summary)
        return summary

    def _is_due(self, record: StepRecord) -> bool:
        log, checkpoint = self._config.log, self._config.checkpoint
        return _crosses(record, given(log.eval_every_samples)) or _crosses(record, given(checkpoint.every_samples))

    def _pause(self, record: StepRecord, log: RunLog) -> None:
        """Evaluate and save after a step, whichever is due; both at the end of the run."""
        at_end = record.end >= given(self._config.max_samples)
        if at_end or _crosses(record, given(self._config.log.eval_every_samples)):
            self._evaluate(log)
        if at_end or self._stop_agreed or _crosses(record, given(self._config.checkpoint.every_samples)):
            self._save()

    def _next_record(self, *, wall_s: float) -> StepRecord:
        """Lay out the next step: the batch in force, or what is left of the run."""
        progress, max_samples = self._progress, given(self._config.max_samples)
        batch = min(progress.global_batch_size, max_samples - progress.position)
        layout = plan(self._config, global_batch_size=progress.global_batch_size, world_size=self._world_size)
        base = given(self._config.optimizer.learning_rate) * self._schedule.factor(progress.position + batch)
        return StepRecord(
            step=progress.step + 1,
            position=progress.position,
            global_batch_size=batch,
            micro_batch_size=layout.micro_batch_size,
            learning_rate=base * progress.learning_rate_factor,
            wall_s=wall_s,
        )

    # What a step taught

    def _read_outcome(self, log: RunLog) -> None:
        """Wait for the outcome of the latest step, if it was not read yet, and take it in."""
        if self._unread is None:
            return
        (record, pending), self._unread = self._unread, None
        outcome = receive(pending, record)
        if outcome.finite:
            self._meter.absorb(outcome.meter_sums)
        self._progress = replace(
            self._progress,
            steps_dropped=self._progress.steps_dropped + (not outcome.finite),
            loss_first=outcome.loss if self._progress.loss_first is None else self._progress.loss_first,
            loss_last=outcome.loss,
        )
        self._undecided = record
        self._stop_agreed = self._stop_agreed or outcome.stop
        log.train(self._row(record, outcome, self._meter.read()))

    def _decide(self, log: RunLog) -> None:
        """Ask the controller for the batch of the next step, and the rule for the rate that goes with it."""
        if self._undecided is None:
            return
        record, self._undecided = self._undecided, None
        before, scale = self._progress, self._meter.read()
        # The step after `record` is under way already: a decision takes effect one step later.
        measurement = Measurement(
            samples_seen=record.end, global_batch_size=before.global_batch_size, noise_scale=scale
        )
        self._control_state, decision = self._controller.update(self._control_state, measurement)
        batch = round(decision.global_batch_size)
        factor = self._learning_rate_factor(scale, batch)
        changed = batch != before.global_batch_size
        self._progress = replace(
            before,
            global_batch_size=batch,
            learning_rate_factor=factor,
            num_batch_changes=before.num_batch_changes + changed,
        )
        if changed:
            log.decision(
                {
                    "step": record.step,
                    "progress/samples": record.end,
                    "batch/before": before.global_batch_size,
                    "batch/after": batch,
                    "lr_factor/before": before.learning_rate_factor,
                    "lr_factor/after": factor,
                    "reason": decision.reason,
                    **noise_columns(scale),
                }
            )

    def _learning_rate_factor(self, scale: NoiseScale, batch: int) -> float:
        return self._rule(scale, batch=batch, reference_batch=given(self._config.global_batch_size))

    def _row(self, record: StepRecord, outcome: StepOutcome, scale: NoiseScale) -> dict[str, Value]:
        (position, wall_s), self._logged = self._logged, (record.position, record.wall_s)
        elapsed, samples = record.wall_s - wall_s, record.position - position
        return {
            "kind": "train",
            "step": record.step,
            "progress/samples": record.end,
            "progress/epoch": record.end / self._num_samples,
            "progress/wall_s": record.wall_s,
            "train/loss": outcome.loss,
            "train/lr": record.learning_rate,
            "train/grad_norm": outcome.grad_norm,
            "train/steps_dropped": self._progress.steps_dropped,
            "batch/global": record.global_batch_size,
            "batch/micro": record.micro_batch_size,
            "batch/accumulation": record.micro_steps(self._world_size),
            **noise_columns(scale),
            "throughput/samples_per_sec": samples / elapsed if samples and elapsed > 0 else None,
        }

    def _evaluate(self, log: RunLog) -> None:
        if self._task.eval_data is None:
            return
        loss = evaluate(
            self._bare_model,
            self._task.eval_data,
            self._task.loss,
            micro_batch_size=given(self._config.micro_batch_size),
            collate=self._task.collate,
            rank=self._accelerator.process_index,
            world_size=self._world_size,
            device=self._accelerator.device,
        )
        self._progress = replace(self._progress, eval_loss=loss)
        log.evaluation(
            {
                "kind": "eval",
                "step": self._progress.step,
                "progress/samples": self._progress.position,
                "eval/loss": loss,
                **{f"eval/{name}": figure(loss) for name, figure in self._task.eval_metrics.items()},
            }
        )

    def _summary(self) -> dict[str, Value]:
        progress, scale = self._progress, self._meter.read()
        figures = {}
        if progress.eval_loss is not None:
            figures = {name: figure(progress.eval_loss) for name, figure in self._task.eval_metrics.items()}
        return {
            "task": self._task.name,
            "world_size": self._world_size,
            "backend": _backend(),
            "device": str(self._accelerator.device.type),
            "samples_seen": progress.position,
            "steps": progress.step,
            "wall_s": progress.wall_s,
            "samples_per_s": progress.position / progress.wall_s,
            "loss_first": progress.loss_first,
            "loss_last": progress.loss_last,
            "eval_loss": progress.eval_loss,
            "bits_per_byte": None,
            **figures,
            "batch_first": given(self._config.global_batch_size),
            "batch_last": progress.global_batch_size,
            "num_batch_changes": progress.num_batch_changes,
            "noise_scale": scale.value,
            "noise_scale_lower": scale.lower,
            "noise_scale_upper": scale.upper,
            "noise_scale_text": str(scale),
            "resolved": str(scale.state),
            "steps_dropped": progress.steps_dropped,
        }

    # Parts

    def _open_log(self, saved: Checkpoint | None) -> RunLog:
        return self._on_rank_0(lambda: self._writing_log(saved)) or SilentLog()

    def _writing_log(self, saved: Checkpoint | None) -> RunLog:
        folder = RunFolder(self._run_dir, resume=self._resume)
        replicas = "replica" if self._world_size == 1 else "replicas"
        title = f"{self._task.name} on {self._world_size} {self._accelerator.device.type} {replicas} → {self._run_dir}"
        return WritingLog(folder, config=self._config, up_to_step=0 if saved is None else saved.step, title=title)

    def _loader(self) -> MicroBatchLoader:
        return MicroBatchLoader(
            self._task.train_data,
            stream=SampleStream(self._num_samples, seed=self._config.seed),
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

    def _save(self) -> None:
        """Write a checkpoint of this moment: every outcome is read, the latest not decided on."""
        optimizer_tensors, optimizer_state = pack_optimizer(self._optimizer, names=self._names())
        state: dict[str, JSON] = {
            "config": asdict(self._config),
            "world_size": self._world_size,
            "num_samples": self._num_samples,
            "progress": asdict(self._progress),
            "control": state_to_json(self._control_state),
            "meter": self._meter.state_dict(),
            "optimizer": optimizer_state,
            "undecided": None if self._undecided is None else asdict(self._undecided),
        }
        self._on_rank_0(
            lambda: save_checkpoint(
                checkpoints_in(self._run_dir),
                step=self._progress.step,
                tensors={"model": pack_model(self._bare_model), "optimizer": optimizer_tensors},
                state=state,
                keep=self._config.checkpoint.keep,
            )
        )

    def _restore(self, saved: Checkpoint, log: RunLog) -> None:
        """Become what the saved run was when it was saved."""
        state: dict[str, Any] = saved.state
        check_same_settings(self._config, saved=state["config"])
        if state["num_samples"] != self._num_samples:
            raise ConfigError(
                f"the data set had {state['num_samples']} samples when {saved.path} was saved and has "
                f"{self._num_samples} now: the order of samples would be another one"
            )
        for path, reason in saved.passed_over:
            log.note(f"passed over checkpoint {path}: {reason}")
        try:
            unpack_model(self._bare_model, saved.tensors("model"))
            unpack_optimizer(
                self._optimizer, names=self._names(), tensors=saved.tensors("optimizer"), state=state["optimizer"]
            )
            self._meter.load_state_dict(state["meter"])
            self._control_state = self._controller.restore(state["control"])
            self._progress = Progress(**state["progress"])
            self._undecided = None if state["undecided"] is None else StepRecord(**state["undecided"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint {saved.path} does not hold what this version needs: {error}") from error
        self._logged = (self._progress.position, self._progress.wall_s)
        log.note(f"resumed from step {self._progress.step}, {self._progress.position:,} samples seen")

    def _on_rank_0(self, action: Callable[[], Result]) -> Result | None:
        return on_rank_0(action, rank=self._accelerator.process_index, device=self._accelerator.device)

    def _names(self) -> dict[torch.nn.Parameter, str]:
        return {parameter: name for name, parameter in self._bare_model.named_parameters()}


def forward_seed(seed: int, position: int) -> int:
    """Return the seed of the forward pass on the micro-batch that begins at `position`.

    Dropout and the like depend on the position in the stream, and so not on restarts, and not on which replica runs
    the micro-batch.
    """
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _crosses(record: StepRecord, every_samples: int) -> bool:
    """Whether the step ended at or beyond the next multiple of `every_samples`."""
    return record.end // every_samples > record.position // every_samples


def _backend() -> str:
    """Return the collective backend's name; "none" in a single process without a process group."""
    return str(dist.get_backend()) if dist.is_initialized() else "none"
