"""A trainer that stops where its held-out loss is low enough; runs inside a replica."""

from __future__ import annotations

import math
import shutil
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.targets.adaptdl_policy import AdaptdlPolicy
from benchmarks.targets.timed_run import Finish, Mark, StepDelay, TimedRun
from dptrain.config.filled_in import given, largest_micro_batch_size
from dptrain.errors import DivergedError
from dptrain.tracking.jsonl import read_rows
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, TrainConfig, Trainer

_GROUPS = {
    "control": ControlConfig,
    "optimizer": OptimizerConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}
_LONG = 10**12
_MOST_ROWS = 400
_MOST_TIMES = 40
_DIVERGED = 20.0


class _Over(BaseException):
    """Ends a run from within, on both replicas after the same evaluation."""


class TimedTrainer(Trainer):
    """Notes time and place of each evaluation, and stops at the target or when it is given up.

    Args:
        config: of the run.
        timed_run: where it ends.
    """

    def __init__(self, config: TrainConfig, timed_run: TimedRun) -> None:
        super().__init__(config)
        self._timed_run = timed_run
        self._began_s = self._paused_s = 0.0
        self.marks: list[Mark] = []
        self.reason = ""
        if timed_run.policy == "adaptdl":
            self._hand_over()
        self._slow_down(timed_run.delay)

    def _train(self, *arguments: Any) -> Any:  # noqa: ANN401 - handed on
        dist.barrier()
        self._began_s = time.perf_counter()
        return super()._train(*arguments)

    def _evaluate(self, log: Any, **more: Any) -> None:  # noqa: ANN401 - handed on
        before_s = time.perf_counter()
        super()._evaluate(log, **more)
        progress, loss = self._run.progress, given(self._run.progress.eval_loss)
        mark = Mark(
            steps=progress.step,
            samples=progress.position,
            seconds=before_s - self._began_s - self._paused_s,
            loss=loss,
        )
        self.marks.append(mark)
        self._paused_s += time.perf_counter() - before_s
        reached = min(mark.loss for mark in self.marks) <= self._timed_run.target
        if not loss < _DIVERGED:
            self.reason = f"diverged: held-out loss {loss:.3g} after {progress.step:,} steps"
        elif not reached and (progress.step >= self._timed_run.most_steps or self._is_late(mark.seconds)):
            self.reason = f"at {loss:.4g} after {progress.step:,} steps"
        elif not reached or progress.position < self._timed_run.least_samples:
            return
        raise _Over

    def _slow_down(self, delay: StepDelay) -> None:
        """Sleep in each forward of the training and before each optimizer step; evaluations are not slowed."""

        def forward(model: nn.Module, arguments: tuple[Any, ...]) -> None:
            if model.training and delay.per_sample_s:
                time.sleep(delay.micro_batch_s(len(arguments[0])))

        if delay != StepDelay():
            self._bare_model.register_forward_pre_hook(forward)
            self._optimizer.register_step_pre_hook(lambda *_: time.sleep(delay.per_step_s))

    def _is_late(self, seconds: float) -> bool:
        """Return whether rank 0 has trained for too long. A collective."""
        late = torch.tensor([seconds > self._timed_run.most_seconds])
        dist.broadcast(late, src=0)
        return bool(late)

    def _hand_over(self) -> None:
        """Let AdaptDL decide in the run's place."""
        run, config = self._run, self._config
        policy = AdaptdlPolicy(
            self._model,
            self._optimizer,
            first_batch=given(config.global_batch_size),
            largest_batch=given(config.control.largest),
            largest_micro_batch=largest_micro_batch_size(config),
        )
        lay_out, decide = run.next_record, run.decide

        def next_record(*, wall_s: float) -> Any:  # noqa: ANN401 - as the run's
            record = lay_out(wall_s=wall_s)
            policy.prepare(micro_batch_size=record.micro_batch_size, passes=record.micro_steps(dist.get_world_size()))
            return record

        def decide_as_adaptdl(log: Any) -> None:  # noqa: ANN401 - as the run's
            decide(log)
            policy.learn()
            batch, before_s = run.progress.global_batch_size, time.perf_counter()
            if policy.is_due:
                batch = policy.batch(batch)
                self._paused_s += time.perf_counter() - before_s
            factor = policy.learning_rate_factor(batch)
            now = replace(run.progress, global_batch_size=batch, learning_rate_factor=factor)
            run._progress = now  # noqa: SLF001 - takes its place

        run.next_record = next_record  # type: ignore[method-assign]
        run.decide = decide_as_adaptdl  # type: ignore[method-assign]


def run_to_target(timed_run: TimedRun, *, run_dir: Path) -> Finish:
    """Run a timed run as one of the replicas."""
    timed_trainer = TimedTrainer(_config(timed_run, run_dir), timed_run)
    try:
        timed_trainer.run()
    except _Over:
        pass
    except DivergedError as error:
        timed_trainer.reason = f"diverged: {error}"
    dist.barrier()
    rows = (
        [row for row in read_rows(run_dir / "metrics.jsonl") if row["kind"] == "train"] if timed_trainer.is_main else []
    )
    if timed_trainer.is_main:
        shutil.rmtree(run_dir)
    return _finish(timed_trainer, rows=rows, target=timed_run.target)


def _config(timed_run: TimedRun, run_dir: Path) -> TrainConfig:
    settings = {
        "device": "cpu",
        "max_samples": _LONG,
        **timed_run.settings,
        "checkpoint": {"every_samples": _LONG},
        "log": {"tracker": "none", **timed_run.settings.get("log", {})},
    }
    nested = {name: _GROUPS[name](**value) if name in _GROUPS else value for name, value in settings.items()}
    return TrainConfig(**nested, run_dir=str(run_dir))


def _finish(timed_trainer: TimedTrainer, *, rows: list[dict[str, Any]], target: float) -> Finish:
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row["time/step_s"] is not None:
            times[row["batch/micro"], row["batch/accumulation"]].append(row["time/step_s"])
    stride = max(1, len(rows) // _MOST_ROWS)
    return Finish(
        end=_end(timed_trainer.marks, target=target),
        reason=timed_trainer.reason,
        marks=timed_trainer.marks,
        rows=[
            {
                name: row.get(name)
                for name in ("step", "progress/samples", "batch/global", "train/lr", "noise_scale/value")
            }
            for row in rows[::stride]
        ],
        step_s={shape: found[-_MOST_TIMES:] for shape, found in times.items()},
    )


def _end(marks: list[Mark], *, target: float) -> Mark | None:
    """Return where the loss first came down to the target, between two evaluations by its logarithm."""
    first = next((number for number, mark in enumerate(marks) if mark.loss <= target), None)
    if first is None:
        return None
    late = marks[first]
    if first == 0:
        return late
    early = marks[first - 1]
    share = math.log(early.loss / target) / math.log(early.loss / late.loss)

    def between(name: str) -> float:
        return float(getattr(early, name) + share * (getattr(late, name) - getattr(early, name)))

    return Mark(steps=between("steps"), samples=between("samples"), seconds=between("seconds"), loss=target)
