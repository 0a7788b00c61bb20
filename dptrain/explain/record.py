"""What a run folder holds, as columns over samples seen; this is the only file of `explain` that reads one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dptrain.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

Row = dict[str, Any]

SAMPLES = "progress/samples"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run folder, read. Empty where the run has not come that far.

    Attributes:
        name: the folder's name.
        train: one row per logged optimizer step, in order.
        evals: one row per evaluation on held-out data, in order.
        decisions: one row per decision of the controller, in order.
        summary: the figures written at the end of a run, or empty for a run that has not ended.
        config: the settings that the run was started with, or empty.
    """

    name: str
    train: Sequence[Row]
    evals: Sequence[Row]
    decisions: Sequence[Row]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def batch_changes(self) -> list[Row]:
        """The decisions that moved the global batch; the others left it where it was."""
        return [row for row in self.decisions if row["batch/before"] != row["batch/after"]]

    @property
    def is_cut_short(self) -> bool:
        """Whether the last step was made smaller by the end of the run, and not by a decision."""
        if len(self.train) < 2:  # noqa: PLR2004 - one step has none before it
            return False
        before, last = self.train[-2:]
        asked_for = {row["batch/after"] for row in self.batch_changes if row["step"] >= before["step"] - 1}
        return last["batch/global"] < before["batch/global"] and last["batch/global"] not in asked_for


def read_run(run_dir: Path) -> RunRecord:
    """Read what there is of a run, be it finished, running or killed half-way.

    Raises:
        ConfigError: where `run_dir` is no run folder, holds no logged step yet, or a log is damaged.
    """
    metrics = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder: give the run folder that `dptrain train` printed")
    if not metrics.is_file():
        raise ConfigError(f"{run_dir} is not a run folder, it has no metrics.jsonl: give the one that holds it")
    rows = read_jsonl(metrics)
    train = [row for row in rows if row.get("kind") == "train" and SAMPLES in row]
    if not train:
        raise ConfigError(f"{metrics} has no training step yet: draw the report after the first logged step")
    return RunRecord(
        name=run_dir.resolve().name,
        train=train,
        evals=[row for row in rows if row.get("kind") == "eval" and SAMPLES in row],
        decisions=read_jsonl(run_dir / "decisions.jsonl"),
        summary=_read_summary(run_dir / "summary.json"),
        config=_read_config(run_dir / "config.yaml"),
    )


def read_jsonl(path: Path) -> list[Row]:
    """Read the rows of a log, without a last line that was torn by a kill; no file is no rows.

    Raises:
        ConfigError: where another line than the last does not parse: the log was damaged, not cut short.
    """
    # Not splitlines, which also splits at rarer ends of line that stand in a text.
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if line and number < len(lines):
                raise ConfigError(f"{path} line {number} is damaged ({error}): remove that line") from error
    return rows


def _read_summary(path: Path) -> Mapping[str, Any]:
    """Read the figures of the run's end; a file that is missing or torn means that the end was not reached."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _read_config(path: Path) -> Mapping[str, Any]:
    """Read the settings; the curves do not depend on them, so a run is drawn without them, too."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def column(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    """Take one number per row, NaN where the row has none (missing, or null for non-finite)."""
    values = (row.get(key) for row in rows)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def smooth(samples: NDArray[np.float64], values: NDArray[np.float64], *, window: float) -> NDArray[np.float64]:
    """Average `values` over the `window` samples round each point, so that the line does not lag behind.

    The window counts samples, not rows: a change of batch does not change what the line shows.

    Args:
        samples: (rows,) positions in samples, ascending.
        values: (rows,) one finite value per position.
        window: full width, in samples.
    """
    begins = np.searchsorted(samples, samples - window / 2, side="left")
    ends = np.searchsorted(samples, samples + window / 2, side="right")
    return np.array([values[begin:end].mean() for begin, end in zip(begins, ends, strict=True)])
