"""How a run goes on from step to step: lays out, reads outcomes late, and hands them to what learns from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, cast

from torch import nn

from dptrain.checkpoint.manifest import JSON
from dptrain.checkpoint.opened import Checkpoint
from dptrain.config.filled_in import given, largest_micro_batch_size
from dptrain.config.train_config import TrainConfig
from dptrain.control import Measurement
from dptrain.cost.ledger import Ledger
from dptrain.data import SampleStream
from dptrain.errors import CheckpointError, DivergedError
from dptrain.noise import NoiseScale
from dptrain.observe import Meter, PendingSum
from dptrain.runtime.step_reduction import StepOutcome, StepRecord, receive
from dptrain.runtime.step_timer import StepTimer
from dptrain.runtime.stragglers import StragglerWatch
from dptrain.tasks.base import Moment
from dptrain.tracking.jsonl import Value
from dptrain.tracking.rows import noise_figures, train_row
from dptrain.tracking.run_log import RunLog, group_columns
from dptrain.train.batch_control import BatchControl
from dptrain.train.progress import Progress
from dptrain.train.step_plan import StepPlan

_MAX_FAILED_SAVES = 3
_GROUPS_A_ROW = 8
"""Groups that each row of the log has, on average."""
_LOSS_HALF_LIFE = 0.02  # of the running mean of the loss, as a part of the run; only a law that reads the loss uses it


class RunProgress:
    """Knows how far the run is, and what its steps have shown.

    All of it happens on every rank, from numbers that are equal on all.

    Args:
        config: filled in.
        meter: absorbs what steps measured.
        world_size: number of replicas.
        stream: order of the training data.
        ledger: counts what steps used.
        bytes_per_step: what one replica sends in a step.
        smallest_micro_batch: fewest samples that the model takes at a time.
        tokens_per_sample: length of a sample, where tokens are counted.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        meter: Meter,
        world_size: int,
        stream: SampleStream,
        ledger: Ledger,
        bytes_per_step: Callable[[], float | None] = lambda: None,
        smallest_micro_batch: int = 1,
        tokens_per_sample: int | None = None,
    ) -> None:
        self._config = config
        self._tokens_per_sample = tokens_per_sample
        self._meter = meter
        self._world_size = world_size
        self._ledger = ledger
        self._bytes_per_step = bytes_per_step
        self._plan = StepPlan(config, world_size=world_size, stream=stream, smallest_micro_batch=smallest_micro_batch)
        self._batch_control = BatchControl(config, world_size=world_size)
        batch = given(config.global_batch_size)
        factor = self._batch_control.learning_rate_factor(meter.read(), batch)
        self._progress = Progress(global_batch_size=batch, learning_rate_factor=factor)
        # A fit takes a third of a millisecond, and nobody asks how long other batches would take where none is tried.
        self._asks_time = config.control.mode in ("advise", "adapt") and config.control.law != "constant"
        self._unread: tuple[StepRecord, PendingSum, float | None, Sequence[str]] | None = None
        self._undecided: StepRecord | None = None
        self._outcome: StepOutcome | None = None
        self._latest_batch = batch
        self._stop_agreed = False
        self._save_agreed = False
        self.step_timer = StepTimer(world_size=world_size)
        self.stragglers = StragglerWatch(world_size=world_size)
        self._clock = (0, 0.0)  # position and seconds at the latest row, for the throughput

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self._progress

    def moment(self, model: nn.Module) -> Moment:
        """Return where the run is, for a hook."""
        step, position = self._progress.step, self._progress.position
        return Moment(step=step, samples_seen=position, global_batch_size=self._latest_batch, model=model)

    @property
    def stop_agreed(self) -> bool:
        """Whether all replicas know that one was asked to stop."""
        return self._stop_agreed

    def take_save(self) -> bool:
        """Return whether any replica was asked to save since the last call."""
        save, self._save_agreed = self._save_agreed, False
        return save

    @property
    def at_end(self) -> bool:
        """Whether the last step was taken."""
        return self._progress.ended_early or self._progress.position >= given(self._config.max_samples)

    def begin_at(self, position: int) -> None:
        """Begin where another run has come to, as a run of its own."""
        self._progress = replace(self._progress, position=position, start=position)
        self._clock = (position, 0.0)

    def next_record(self, *, wall_s: float) -> StepRecord:
        """Lay out the next step: the batch in force, or what is left of the run."""
        record = self._plan.record(self._progress, wall_s=wall_s)
        self.step_timer.began(record)
        return record

    def sent(
        self,
        record: StepRecord,
        pending: PendingSum,
        *,
        flops_per_sample: float | None,
        wall_s: float,
        parts: Sequence[str] = (),
    ) -> None:
        """Note that a step was handed to the device, and that its outcome is under way."""
        self._unread = (record, pending, flops_per_sample, parts)
        self._latest_batch = record.global_batch_size
        self._progress = self._progress.updated(step=record.step, position=record.end, wall_s=wall_s)

    def paused(self, *, wall_s: float) -> None:
        """Note that something else than training took time up to now."""
        self.step_timer.disturbed()
        self._ledger.pause(seconds=wall_s - self._progress.wall_s, energy_j=0.0)  # its energy is part of the next step
        self._clock = (self._progress.position, wall_s)

    def spent(self, *, energy_j: float) -> None:
        """Note the energy that all devices drew up to now and that no step has reported."""
        self._ledger.pause(seconds=0.0, energy_j=energy_j)

    @property
    def largest_micro_batch_size(self) -> int:
        """The largest micro-batch that is allowed and known to fit."""
        return largest_micro_batch_size(self._plan.config)

    def end_early(self) -> None:
        """End the run after the latest step, as at its end."""
        self._progress = replace(self._progress, ended_early=True)

    def evaluated(self, figures: Mapping[str, float]) -> None:
        """Note the held-out figures."""
        self._progress = replace(self._progress, eval_loss=figures["loss"], eval_figures=dict(figures))

    def read_outcome(self, log: RunLog) -> None:
        """Wait for the outcome of the latest step, if it was not read yet, and take it in.

        One replica may do so earlier than the others, to save: what all must do together follows in `decide`.

        Raises:
            DesyncError: where replicas are not at the same step.
        """
        if self._unread is None:
            return
        (record, pending, flops_per_sample, parts), self._unread = self._unread, None
        outcome = receive(pending, record, parts=parts)
        interval_s = self.step_timer.interval_of(record)
        self._ledger.step(
            seconds=self._progress.wall_s - record.wall_s if interval_s is None else interval_s,
            num_samples=record.global_batch_size,
            flops_per_sample=flops_per_sample,
            energy_j=outcome.energy_j,
            bytes_sent=self._bytes_per_step(),
        )
        if outcome.measured:
            self._meter.absorb_step(outcome.meter_sums, usable=outcome.finite)
        self.step_timer.learn(record, outcome)
        self._progress = self._progress.updated(
            steps_dropped=self._progress.steps_dropped + (not outcome.finite),
            skipped_in_row=0 if outcome.finite else self._progress.skipped_in_row + 1,
            loss_first=outcome.loss if self._progress.loss_first is None else self._progress.loss_first,
            loss_last=outcome.loss,
            loss_mean=self._loss_mean(record, outcome),
        )
        self._undecided = record
        self._outcome = outcome
        self._save_agreed = self._save_agreed or outcome.save
        if log.takes(record.step):
            log.train(self._row(record, outcome, self._meter.read()))
        if straggler := self.stragglers.learn(outcome, record):
            log.note(straggler)
        if not outcome.finite:
            log.note(self._skipped(record, outcome))

    def _check(self, record: StepRecord, outcome: StepOutcome) -> None:
        """Note a request to stop, and end the run where it cannot go on; on all replicas at once."""
        self._stop_agreed = self._stop_agreed or outcome.stop
        if self._progress.skipped_in_row >= self._config.optimizer.max_skipped_steps:
            raise DivergedError(
                f"{self._progress.skipped_in_row} steps in a row had to be skipped, and the run ends; "
                f"{self._skipped(record, outcome)}: go on from the latest checkpoint with a lower "
                f"optimizer.learning_rate, or repair the data"
            )
        if outcome.folder_removed:
            raise CheckpointError(
                f"the run folder {self._config.run_dir or ''} was deleted, emptied or moved while the run trained, and "
                f"the run ends at step {record.step:,}, for nothing of it could be continued: put the folder back and "
                "continue with --resume, or start anew"
            )
        if outcome.failed_saves >= _MAX_FAILED_SAVES:
            raise CheckpointError(
                f"{outcome.failed_saves} checkpoints in a row could not be written, and the run ends at step "
                f"{record.step:,}; earlier checkpoints are untouched"
            )

    def _skipped(self, record: StepRecord, outcome: StepOutcome) -> str:
        return f"step {record.step:,} was skipped: its gradient was not finite{self._culprit(record, outcome)}"

    def _culprit(self, record: StepRecord, outcome: StepOutcome) -> str:
        """Name the replica whose own gradient was not finite, and what it was reading."""
        if outcome.bad_rank is None:
            return f" on {outcome.bad_ranks} replicas" if outcome.bad_ranks else ""
        return f" on rank {outcome.bad_rank} ({self.samples_of(record, rank=outcome.bad_rank)})"

    def samples_of(self, record: StepRecord, *, rank: int) -> str:
        """Name the samples that a replica reads in a step, the first of them at least."""
        return self._plan.samples_of(record, rank=rank)

    @contextmanager
    def located(self, record: StepRecord, *, rank: int) -> Iterator[None]:
        """Add the step and its samples to whatever the task raises."""
        try:
            yield
        except Exception as error:
            error.add_note(f"in step {record.step:,}, {self.samples_of(record, rank=rank)}")
            raise

    def decide(self, log: RunLog) -> None:
        """Ask the controller for the batch of the next step, and the rule for the rate that goes with it.

        Raises:
            DivergedError: where too many steps in a row had to be skipped.
            CheckpointError: where too many checkpoints in a row could not be written.
        """
        if self._undecided is None:
            return
        record, self._undecided = self._undecided, None
        if self._outcome is not None:  # else it was read by an earlier attempt
            self._check(record, self._outcome)
            if self._outcome.halved:
                self._limit_micro_batch(record, log)
        before = self._progress
        # The step after `record` is under way already: a decision takes effect one step later.
        measurement = Measurement(
            samples_seen=record.end,
            global_batch_size=before.global_batch_size,
            noise_scale=self._meter.read(),
            step_time=self.step_timer.model if self._asks_time else None,
            loss=before.loss_mean,
        )
        self._progress = self._batch_control.decide(record, before, measurement, log)

    def follow(self, decisions: Mapping[int, int], *, up_to: int) -> None:
        """Take the decisions that an earlier attempt put on record; see `BatchControl.follow`."""
        self._batch_control.follow(decisions, up_to=up_to)

    def _loss_mean(self, record: StepRecord, outcome: StepOutcome) -> float | None:
        """Return the running mean of the loss, with a half-life of a part of the run."""
        before = self._progress.loss_mean
        if not math.isfinite(outcome.loss):
            return before
        if before is None:
            return outcome.loss
        kept: float = 0.5 ** (record.global_batch_size / (_LOSS_HALF_LIFE * given(self._config.max_samples)))
        return kept * before + (1 - kept) * outcome.loss

    def _limit_micro_batch(self, record: StepRecord, log: RunLog) -> None:
        """Take smaller micro-batches from now on, because on some replica those of a step did not fit into memory."""
        limit = max(1, record.micro_batch_size // 2)
        if limit < (self._progress.micro_batch_limit or record.micro_batch_size):
            self._progress = replace(self._progress, micro_batch_limit=limit)
            self._apply_limit()
            log.note(
                f"step {record.step:,} was taken with micro-batches cut in halves, because {record.micro_batch_size} "
                f"samples did not fit into memory: from here on they have at most {limit}, and the batch stays as it is"
            )

    def _apply_limit(self) -> None:
        limit = self._progress.micro_batch_limit
        if limit is not None:
            self._plan.limit_micro_batch(limit)
            self._batch_control.limit_micro_batch(self._plan.config)

    def _row(self, record: StepRecord, outcome: StepOutcome, scale: NoiseScale) -> dict[str, Value]:
        (position, wall_s), self._clock = self._clock, (record.position, record.wall_s)
        elapsed, samples = record.wall_s - wall_s, record.position - position
        columns: dict[str, Value] = {
            "step": record.step,
            "progress/samples": record.end,
            "progress/epoch": self._plan.epochs(record.end),
            "progress/wall_s": record.wall_s,
            "train/loss": outcome.loss,
            **self._parts(record, outcome),
            "train/lr": record.learning_rate,
            "train/grad_norm": outcome.grad_norm,
            "train/steps_dropped": self._progress.steps_dropped,
            "batch/global": record.global_batch_size,
            "batch/micro": record.micro_batch_size,
            "batch/accumulation": record.micro_steps(self._world_size),
            "batch/lr_factor": record.learning_rate_factor,
            "throughput/samples_per_sec": samples / elapsed if samples and elapsed > 0 else None,
            **self._tokens(record, samples / elapsed if samples and elapsed > 0 else None),
            "time/step_s": self.step_timer.interval_of(record),
            "time/world_size": self._world_size,
            **self._ledger.columns(),
        }
        return train_row(columns, noise_scale=scale, groups=self._groups(record))

    def _tokens(self, record: StepRecord, samples_per_s: float | None) -> dict[str, Value]:
        """Return the columns in tokens; none where samples are not made of tokens."""
        length = self._tokens_per_sample
        if length is None:
            return {}
        return {
            "progress/tokens": length * record.end,
            "batch/tokens": length * record.global_batch_size,
            "throughput/tokens_per_sec": None if samples_per_s is None else length * samples_per_s,
        }

    def _parts(self, record: StepRecord, outcome: StepOutcome) -> dict[str, Value]:
        """Return the parts of the loss as columns; those named `figure/part of the model` as often as the groups."""
        of_the_model = [name for name in outcome.parts if "/" in name]
        left_out = () if self._in_this_row(record, len(of_the_model)) else of_the_model
        return {f"train/{name}": value for name, value in outcome.parts.items() if name not in left_out}

    def _groups(self, record: StepRecord) -> Mapping[str, NoiseScale]:
        return self._meter.read_groups() if self._in_this_row(record, self._meter.num_groups) else {}

    def _in_this_row(self, record: StepRecord, num_columns: int) -> bool:
        """Return whether figures of so many parts of the model are due, so that rows stay short: 200 are 26 KB."""
        stride = self._config.log.every_steps * max(1, num_columns // _GROUPS_A_ROW)
        return record.end >= given(self._config.max_samples) or record.step % stride == 0

    def figures(self) -> dict[str, Value]:
        """Return the figures of the whole run, as far as they are known here."""
        progress, scale = self._progress, self._meter.read()
        if progress.steps_dropped == progress.step > 0:
            raise DivergedError(
                f"all {progress.step:,} steps of the run had to be skipped, for no gradient was finite: lower "
                "optimizer.learning_rate, or repair the loss or the data"
            )
        length = self._tokens_per_sample
        tokens: dict[str, Value] = {} if length is None else {"tokens_seen": length * progress.position}
        trained = progress.samples_trained
        return {
            "start_samples": progress.start,
            "samples_seen": progress.position,
            **tokens,
            "steps": progress.step,
            "wall_s": progress.wall_s,
            "samples_per_s": None if trained is None else trained / progress.wall_s,
            "loss_first": progress.loss_first,
            "loss_last": progress.loss_last,
            "eval_loss": progress.eval_loss,
            "batch_first": given(self._config.global_batch_size),
            "batch_last": progress.global_batch_size,
            "num_batch_changes": progress.num_batch_changes,
            **noise_figures(scale),
            **group_columns(self._meter.read_groups()),
            **{f"train/{name}": value for name, value in self._shares().items()},
            "steps_dropped": progress.steps_dropped,
            **self._ledger.figures(),
            "bytes_per_step": self._bytes_per_step(),
            "step_time_error": None if (model := self.step_timer.model) is None else model.error,
            "bits_per_byte": None,
            **{name: value for name, value in progress.eval_figures.items() if name != "loss"},
        }

    def _shares(self) -> Mapping[str, float]:
        """Return the latest step's figures of parts of the model, such as the shares of samples that experts get."""
        parts = {} if self._outcome is None else self._outcome.parts
        return {name: value for name, value in parts.items() if "/" in name}

    def state(self) -> dict[str, JSON]:
        """Return what a checkpoint must hold. Every outcome must have been read; the latest is not decided on."""
        assert self._unread is None, "saved before the outcome of the latest step was read"
        return {
            "progress": asdict(self._progress),
            "control": self._batch_control.state(),
            "step_timer": self.step_timer.state(),
            "ledger": self._ledger.state(),
            "meter": self._meter.state_dict(),
            "undecided": None if self._undecided is None else asdict(self._undecided),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._meter.load_state_dict(state["meter"])
        self._batch_control.restore(state["control"])
        self._progress = Progress(**_with_start(state))
        self._meter.align(self._progress.step)
        self._apply_limit()
        self.step_timer.restore(state["step_timer"])
        self._ledger.restore(state["ledger"])
        self._undecided = None if state["undecided"] is None else StepRecord(**state["undecided"])
        self._clock = (self._progress.position, self._progress.wall_s)


def _with_start(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the progress of a checkpoint; in one of an earlier version it does not say where a branch began."""
    branched = state.get("config", {}).get("branch_from") is not None
    return {"start": None if branched else 0, **state["progress"]}


def start_of(*, saved: Checkpoint | None, branch: Checkpoint | None) -> int | None:
    """Return the position at which a run begins, or began; None where an earlier version did not note it.

    Args:
        saved: checkpoint of its own that it goes on from.
        branch: checkpoint of another run that it begins at.
    """
    if saved is not None:
        start: int | None = _with_start(saved.state)["start"]
        return start
    return 0 if branch is None else int(cast("Any", branch.state)["progress"]["position"])
