"""The log of a run: JSONL files, tracker and console on rank 0, nothing on the other ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby, pairwise
from pathlib import Path
from typing import Protocol

from dptrain.config.filled_in import given
from dptrain.config.train_config import TrainConfig
from dptrain.errors import ConfigError, DptrainError
from dptrain.noise import NoiseScale
from dptrain.tracking.console import make_view
from dptrain.tracking.export import start_exports
from dptrain.tracking.jsonl import JsonlLog, Value, read_sound_rows, rows_from_end
from dptrain.tracking.redact import refuse_secrets
from dptrain.tracking.row_text import is_rate_alone
from dptrain.tracking.run_facts import RunFacts
from dptrain.tracking.run_folder import RunFolder, write_config, write_private
from dptrain.tracking.tracker import start_tracker


class RunLog(Protocol):
    """Takes rows; the keys are described in `metrics`."""

    @property
    def on_record(self) -> Sequence[tuple[int, int]]:
        """What an earlier attempt decided after the checkpoint that this one goes on from, as its log has it.

        Pairs (step, global batch size from there on), and at the end (last step that was decided on, 0); empty where
        there was no earlier attempt.
        """

    def takes(self, step: int) -> bool:
        """Whether anybody would see the row of this step; no other need be made."""

    def train(self, row: Mapping[str, Value]) -> None:
        """Take the row of an optimizer step."""

    def evaluation(self, row: Mapping[str, Value]) -> None:
        """Take the row of an evaluation."""

    def decision(self, row: Mapping[str, Value]) -> None:
        """Take the row of a change of the batch."""

    def note(self, text: str) -> None:
        """Take a sentence for the user."""

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Take the figures of the whole run."""

    def close(self) -> None:
        """Close it; safe to call twice."""


class SilentLog:
    """The log of every rank but 0."""

    on_record: Sequence[tuple[int, int]] = ()

    def takes(self, step: int) -> bool:  # noqa: ARG002 - nobody sees any
        """Say no."""
        return False

    def train(self, row: Mapping[str, Value]) -> None:
        """Do nothing."""

    def evaluation(self, row: Mapping[str, Value]) -> None:
        """Do nothing."""

    def decision(self, row: Mapping[str, Value]) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class WritingLog:
    """The log of rank 0.

    Training does not depend on the log. A row that cannot be written is kept and written before the next one; the
    first such failure is shown, and the summary counts them.

    Args:
        folder: the run's; closed with the log, also where the log cannot be opened.
        config: filled in.
        up_to_step: the step after which rows of an earlier attempt are dropped; 0 for a new run.
        facts: for the first line of the view, and for `run.json`.

    Raises:
        ConfigError: where the settings hold a secret, or the folder does not take them.
    """

    def __init__(self, folder: RunFolder, *, config: TrainConfig, up_to_step: int, facts: RunFacts) -> None:
        self._folder = folder
        self._every_steps = config.log.every_steps
        self._num_failures = 0
        with ExitStack() as stack:
            stack.callback(folder.close)
            refuse_secrets(config)
            try:
                self.on_record = _on_record(folder, from_step=up_to_step)
                write_config(folder.config, config)
                if not (up_to_step and folder.facts.exists()):  # a resumed run keeps the date of its start
                    write_json(folder.facts, facts.record())
                folder.summary.unlink(missing_ok=True)  # of an earlier end, which this run extends
                self._metrics = JsonlLog.resume(folder.metrics, up_to=up_to_step)
                # Decisions that are followed again stay in the file: they are not logged twice.
                self._decisions = JsonlLog.resume(folder.decisions, up_to=self.on_record[-1][0] if up_to_step else -1)
                damage = self._damage(up_to_step)
            except OSError as error:
                place = error.filename or folder.path
                raise ConfigError(f"cannot write to run folder {place}: {error.strerror or error}") from error
            self._view = make_view(
                max_samples=given(config.max_samples),
                title=facts.line(run_dir=folder.path),
                print_every_steps=config.log.print_every_steps,
                num_steps=_num_steps(config, start=facts.start_samples),
                level=config.noise.level,
                style=config.log.console,
            )
            stack.callback(self._view.close)
            if damage:
                self._view.note(damage)
            if not up_to_step and self._metrics.last_dropped:
                self._view.note(
                    f"no checkpoint to go on from: the run begins anew, and the rows of its log up to step "
                    f"{self._metrics.last_dropped:,} are dropped"
                )
            self._exports = start_exports(
                heartbeat=folder.path / "heartbeat.json",
                metrics_file=config.log.metrics_file,
                metrics_port=config.log.metrics_port,
                opentelemetry=config.log.opentelemetry,
                run_name=folder.path.name,
                warn=self._view.note,
            )
            stack.callback(self._exports.close)
            stack.callback(self._end, self._metrics, file=folder.metrics)
            stack.callback(self._end, self._decisions, file=folder.decisions)
            self._tracker = start_tracker(
                choice=config.log.tracker,
                project=config.log.project,
                run_name=folder.path.name,
                run_dir=folder.path,
                config=asdict(config),
                warn=self._view.note,
            )
            stack.callback(self._tracker.finish, {})  # where the run ended before its end; else it is done already
            self._closing = stack.pop_all()

    def takes(self, step: int) -> bool:
        """Whether the row of this step is written, shown or exported."""
        return step % self._every_steps == 0 or self._view.takes(step) or self._exports.is_due()

    def _damage(self, up_to_step: int) -> str:
        """Return one sentence on what the logs lack, or have too much, up to the checkpoint; empty for nothing."""
        found = [
            f"{name}: {log.damage}"
            for name, log in (("metrics.jsonl", self._metrics), ("decisions.jsonl", self._decisions))
            if log.damage
        ]
        missing = _gaps(self._metrics.steps, every_steps=self._every_steps, up_to=up_to_step) if up_to_step else ""
        if missing:
            found.insert(0, f"metrics.jsonl has no rows of steps {missing}")
        return f"the log is damaged, and training goes on without it: {'; '.join(found)}" if found else ""

    def train(self, row: Mapping[str, Value]) -> None:
        """Show the row, and write it where its step is to be logged."""
        self._view.update(row)
        self._exports.update(row)
        step = int(row["step"] or 0)
        if step % self._every_steps == 0:
            self._go_on(lambda: self._metrics.write(row), file=self._folder.metrics)
            self._tracker.log(row, step=step)

    def evaluation(self, row: Mapping[str, Value]) -> None:
        """Write and show the row."""
        self._go_on(lambda: self._metrics.write(row), file=self._folder.metrics)
        self._tracker.log(row, step=int(row["step"] or 0))
        self._exports.update(row)
        self._view.evaluation(row)

    def decision(self, row: Mapping[str, Value]) -> None:
        """Write and show the row."""
        self._go_on(lambda: self._decisions.write(row), file=self._folder.decisions)
        if not is_rate_alone(row):  # those are many, and the rate is a column of each step
            self._view.decision(row)

    def note(self, text: str) -> None:
        """Show the sentence."""
        self._view.note(text)

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Write the summary and close the tracker."""
        summary = {**summary, "log_failures": self._num_failures}
        self._go_on(lambda: write_json(self._folder.summary, summary), file=self._folder.summary)
        self._tracker.finish(summary)

    def close(self) -> None:
        """Release terminal, files and folder."""
        self._closing.close()

    def _go_on(self, write: Callable[[], object], *, file: Path) -> None:
        try:
            write()
        except OSError as error:
            self._num_failures += 1
            if self._num_failures == 1:
                self._view.note(
                    f"cannot write {file}: {error.strerror or error}; training continues; unwritten rows "
                    "follow once the file can be written"
                )

    def _end(self, log: JsonlLog, *, file: Path) -> None:
        try:
            log.close()
        except OSError as error:
            self._view.note(f"the last rows of {file} are lost: {error.strerror or error}")


def _num_steps(config: TrainConfig, *, start: int | None) -> int | None:
    """Return the length of a run in steps where its batch is constant, from the position that it begins at."""
    constant = config.control.law == "constant" or config.control.mode != "adapt"
    if start is None or not constant:
        return None
    return -(-(given(config.max_samples) - start) // given(config.global_batch_size))


def _on_record(folder: RunFolder, *, from_step: int) -> list[tuple[int, int]]:
    """Return the batches that were decided on from a step on, and the last step that was decided on.

    A checkpoint is written before its own step is decided on, so that decision belongs to them.
    """
    if not from_step:
        return []
    decisions = read_sound_rows(folder.decisions)[0] if folder.decisions.exists() else []
    pairs = [(row["step"], row.get("batch/after")) for row in decisions if row.get("applied", True)]
    found = [
        (step, batch)
        for step, batch in dict.fromkeys(pairs)
        if type(step) is int and type(batch) is int and batch >= 1 and step >= from_step
    ]
    # The latest step that is logged may not have been decided on when the attempt ended.
    steps = [_latest_step(folder.metrics) - 1, *(step for step, _ in found)]
    return [*found, (max(steps, default=0), 0)]


def _latest_step(path: Path) -> int:
    """Return the step of the last row of a log that has one; 1 where none has. Only the end of the log is read."""
    try:
        rows = (row for _, _, row in rows_from_end(path))
        return next((step for row in rows if type(step := row.get("step")) is int), 1)
    except DptrainError:  # damaged near its end
        return next((step for row in reversed(read_sound_rows(path)[0]) if type(step := row["step"]) is int), 1)


def _gaps(steps: Sequence[int], *, every_steps: int, up_to: int) -> str:
    """Name the steps up to `up_to` that have no row; empty where none is missing.

    Rows may have been `every_steps` apart, or otherwise in an earlier attempt: a distance that is found three times in
    a row was a setting and is no gap. Three losses of as many rows, which lie apart, are three gaps.
    """
    places = sorted({0, *steps, up_to + 1})
    in_a_row = groupby(after - before for before, after in pairwise(places))
    usual = {every_steps, *(distance for distance, equal in in_a_row if len(list(equal)) >= _OFTEN)}
    gaps = [(before + 1, after - 1) for before, after in pairwise(places) if after - before > max(1, *usual)]
    shown = ", ".join(f"{first:,}–{last:,}" if last > first else f"{first:,}" for first, last in gaps[:_MAX_GAPS])
    return f"{shown}{f' and {len(gaps) - _MAX_GAPS} more' if len(gaps) > _MAX_GAPS else ''}"


_OFTEN, _MAX_GAPS = 3, 5


def write_json(path: Path, record: Mapping[str, Value]) -> None:
    """Write a flat record as strict JSON, in one step; figures that are not finite become null."""
    write_private(path, json.dumps(finite(record), indent=2) + "\n")  # ASCII: nothing steers a terminal


def finite(record: Mapping[str, Value]) -> dict[str, Value]:
    """Return a record in which a figure that is not finite is null, which JSON has instead."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def noise_columns(scale: NoiseScale) -> dict[str, Value]:
    """Return a noise scale as the columns of a row; none before the first measured step."""
    if scale.num_steps == 0:
        return {}
    return {
        "noise_scale/value": scale.value,
        "noise_scale/lower": scale.lower,
        "noise_scale/upper": scale.upper if math.isfinite(scale.upper) else None,
        "noise_scale/state": str(scale.state),
        "noise_scale/grad_sq": scale.grad_sq_norm,
        "noise_scale/trace": scale.noise_trace,
        "noise_scale/effective_steps": scale.effective_steps,
        "noise_scale/window_mean": scale.window_mean,
    }


def group_columns(scales: Mapping[str, NoiseScale]) -> dict[str, Value]:
    """Return the noise scales of groups of parameters as columns of a row."""
    columns: dict[str, Value] = {}
    for name, scale in scales.items():
        if scale.num_steps == 0:
            continue
        columns[f"noise_scale/{name}/value"] = scale.value
        columns[f"noise_scale/{name}/lower"] = scale.lower
        columns[f"noise_scale/{name}/upper"] = scale.upper if math.isfinite(scale.upper) else None
    return columns
