"""What a run folder holds, as columns over samples seen; this is the only file of `explain` that reads one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dptrain.errors import ConfigError
from dptrain.noise import Resolution

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

Row = dict[str, Any]

SAMPLES = "progress/samples"

_NEEDED = {
    "train": (SAMPLES, "batch/global"),
    "eval": (SAMPLES,),
    "decision": (SAMPLES, "step", "batch/before", "batch/after"),
}
"""Figures without which a row stands nowhere."""

_FACTS = {"started", "dptrain_version", "torch_version", "python_version", "machine", "device_type", "device_name"}
_TEXTS = {"kind", "reason", "noise_scale/state", "task", "backend", "device", *_FACTS}
"""Fields that are read as text; every other one is read as a number."""

SMOOTHING_SHARE = 0.02
"""Part of the run, in samples, that each point of a smoothed line averages over; chosen by eye."""

_INTERVAL = ("value", "lower", "upper")
_KNOWN = (str(Resolution.RESOLVED), str(Resolution.AT_LEAST))
_GROUP = re.compile(r"noise_scale/(.+)/value")

MOST_ROWS = 10_000
"""Of a log that are taken, evenly spaced: more than a page can show. What rows count up to there is lost with none."""

_LONGEST_TEXT = 500
_LARGEST = 1e60  # what is beyond is no measurement, and products of such overflow


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run folder, read. Empty where the run has not come that far.

    A folder may come from anybody: in the rows and the summary, numbers are finite or None, texts are short and
    printable. Texts are not escaped; that belongs to where they are written.

    Attributes:
        name: the folder's name.
        train: one row per logged optimizer step, in order; of a long log, every so many.
        evals: one row per evaluation on held-out data, in order.
        decisions: one row per decision of the controller, in order, with the advice that was not acted on.
        summary: the figures written at the end of a run, or empty for a run that has not ended.
        config: the settings that the run was started with, or empty; read it through `setting`.
        facts: date, versions, device and sizes from the start of the run, or empty.
    """

    name: str
    train: Sequence[Row]
    evals: Sequence[Row]
    decisions: Sequence[Row]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batch_changes(self) -> list[Row]:
        """The decisions that moved the global batch; the others left it where it was, or were advice."""
        return [row for row in self.decisions if row["batch/before"] != row["batch/after"] and is_applied(row)]

    @property
    def advice(self) -> list[Row]:
        """The decisions that would have moved the global batch, had they been acted on."""
        return [row for row in self.decisions if row["batch/before"] != row["batch/after"] and not is_applied(row)]

    @property
    def is_cut_short(self) -> bool:
        """Whether the last step was made smaller by the end of the run, and not by a decision."""
        if len(self.train) < 2:  # noqa: PLR2004 - one step has none before it
            return False
        before, last = self.train[-2:]
        asked_for = {row["batch/after"] for row in self.batch_changes if row["step"] >= before["step"] - 1}
        return last["batch/global"] < before["batch/global"] and last["batch/global"] not in asked_for

    @property
    def window(self) -> float:
        """How many samples a point of a smoothed line averages over."""
        return SMOOTHING_SHARE * self.samples_trained

    @property
    def start(self) -> float:
        """Position in samples at which the run began: where the run that it branched off from was, else 0."""
        first = self.train[0]
        known = self.facts.get("start_samples")
        if not isinstance(known, int | float):
            # Of an earlier version, whose branches did not note it: what lies before the first row.
            steps = max(first.get("step") or 1, 1)
            known = 0 if self.setting("branch_from") is None else first[SAMPLES] - steps * first["batch/global"]
        return float(min(max(known, 0), max(first[SAMPLES] - first["batch/global"], 0)))

    @property
    def samples_trained(self) -> float:
        """Samples of this run alone, which its steps, its time and its cost belong to."""
        return float(self.train[-1][SAMPLES]) - self.start

    def smoothed(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return where the training rows have a figure, in samples, and its mean over `window` there."""
        samples, values = column(self.train, SAMPLES), column(self.train, key)
        finite = np.isfinite(values)
        return samples[finite], smooth(samples[finite], values[finite], window=self.window)

    def setting(self, name: str) -> str | float | None:
        """Return a setting by its dotted name; None where it is not known, or no plain value."""
        value: Any = self.config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, bool):
            return str(value).lower()
        return plain(value) if isinstance(value, str) else _number(value)

    def names_in(self, group: str) -> list[str]:
        """Return the names of the settings of a group, such as those of "control" or "control.law_options"."""
        settings: Any = self.config
        for key in group.split("."):
            settings = settings.get(key) if isinstance(settings, dict) else None
        return [plain(name) for name in settings if isinstance(name, str)] if isinstance(settings, dict) else []

    def groups(self) -> dict[str, Row]:
        """Return the latest noise scale of each group of parameters, with the fields of a training row."""
        found: dict[str, Row] = {}
        for row in self.train:
            for key in row:
                if (match := _GROUP.fullmatch(key)) is not None:
                    found[match[1]] = {
                        f"noise_scale/{field}": row.get(f"noise_scale/{match[1]}/{field}") for field in _INTERVAL
                    }
        for row in found.values():
            row["noise_scale/state"] = _state(row, said=Resolution.RESOLVED)
        return found

    def first_and_last_known(self) -> tuple[Row, Row] | None:
        """Return the rows between which something is known of the noise scale: from the first resolved one if any."""
        known = [row for row in self.train if known_lower(row) is not None]
        resolved = [row for row in known if is_resolved(row)]
        return ((resolved or known)[0], known[-1]) if known else None

    def last(self, key: str, *, in_summary: str | None = None) -> float | None:
        """Return a figure of the summary, or else of the last row that has it; None where it is not known."""
        found = self.summary.get(in_summary) if in_summary else None
        rows = (row[key] for row in reversed(self.train) if row.get(key) is not None)
        return next(rows, None) if found is None else found


def is_applied(row: Row) -> bool:
    """Return whether a decision was applied; those of a run that only advises were not."""
    return row.get("applied") is not False


def is_resolved(row: Row) -> bool:
    """Return whether the noise scale of a row and both ends of its interval are known."""
    return row.get("noise_scale/state") == Resolution.RESOLVED


def known_lower(row: Row) -> float | None:
    """Return the lower end of the row's interval, None where nothing is known of the noise scale."""
    return row.get("noise_scale/lower") if row.get("noise_scale/state") in _KNOWN else None


def read_run(run_dir: Path, *, most_rows: int | None = MOST_ROWS) -> RunRecord:
    """Read what there is of a run, be it finished, running or killed half-way.

    Args:
        run_dir: the folder.
        most_rows: training rows that are taken of a longer log, evenly spaced; None for all.

    Raises:
        ConfigError: where `run_dir` is no run folder, holds no logged step yet, or a log is damaged.
    """
    metrics = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder: give the run folder that `dptrain train` printed")
    if not metrics.is_file():
        raise ConfigError(f"{run_dir} is not a run folder, it has no metrics.jsonl: give the one that holds it")
    rows = read_jsonl(metrics)
    train = _standing([row for row in rows if row.get("kind") == "train"], kind="train", most=most_rows)
    if not train:
        raise ConfigError(f"{metrics} has no training step yet: draw the report after the first logged step")
    return RunRecord(
        name=plain(run_dir.resolve().name),
        train=train,
        evals=_standing([row for row in rows if row.get("kind") == "eval"], kind="eval"),
        decisions=_standing(read_jsonl(run_dir / "decisions.jsonl"), kind="decision"),
        summary=_read_summary(run_dir / "summary.json"),
        config=_read_config(run_dir / "config.yaml"),
        facts=_read_summary(run_dir / "run.json"),
    )


def _standing(rows: Sequence[Row], *, kind: str, most: int | None = None) -> list[Row]:
    """Return the rows of a kind that say where they stand, in the order of their samples, and no more than are needed.

    The last two are among them: they show whether the end of the run shortened the last step.
    """
    spacing = 1 if most is None else max(1, len(rows) // most)
    every = [*rows[:-2:spacing], *rows[-2:]]
    found = [row for row in map(_clean, every) if all(_stands(row, key, kind=kind) for key in _NEEDED[kind])]
    for row in found:
        if "noise_scale/state" in row:
            row["noise_scale/state"] = _state(row, said=row["noise_scale/state"])
    return sorted(found, key=lambda row: float(row[SAMPLES]))


def _state(row: Row, *, said: str | None) -> str:
    """Return what is known of a noise scale: what the row says, but never more than its figures tell."""
    value, lower, upper = (row.get(f"noise_scale/{field}") for field in _INTERVAL)
    if said not in _KNOWN or lower is None or lower < 0:
        return str(Resolution.NOT_RESOLVED)
    if said == Resolution.RESOLVED and value is not None and upper is not None and value >= 0 and lower < upper:
        return str(Resolution.RESOLVED)
    return str(Resolution.AT_LEAST if lower > 0 else Resolution.NOT_RESOLVED)


def _stands(row: Row, key: str, *, kind: str) -> bool:
    """Return whether a row has a needed figure, of a possible size."""
    value = row.get(key)
    return value is not None and value >= (1 if kind == "train" or key.startswith("batch/") else 0)


def read_jsonl(path: Path) -> list[Row]:
    """Read the rows of a log, without a last line that was torn by a kill; no file is no rows.

    Raises:
        ConfigError: where another line than the last is no row: the log was damaged, not cut short.
    """
    # Not splitlines, which also splits at rarer ends of line that stand in a text.
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_fields(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            if line and number < len(lines):
                raise ConfigError(f"{path} line {number} is damaged ({error}): remove that line") from error
    return rows


def _read_summary(path: Path) -> Mapping[str, Any]:
    """Read the figures of the run's end; a file that is missing or torn means that the end was not reached."""
    try:
        return _clean(_fields(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _read_config(path: Path) -> Mapping[str, Any]:
    """Read the settings; the curves do not depend on them, so a run is drawn without them, too."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _fields(row: object) -> Row:
    """Return a row as one.

    Raises:
        TypeError: where it is something else.
    """
    if not isinstance(row, dict):
        raise TypeError("no row of fields")
    return row


def _clean(row: Row) -> Row:
    """Keep of a row what is of its field's type; what is not counts as not known."""
    return {plain(key): _field(key, value) for key, value in row.items()}


def _field(key: str, value: object) -> object:
    if key in _TEXTS:
        return plain(value) if isinstance(value, str) else None
    return value if key == "applied" and isinstance(value, bool) else _number(value)


def _number(value: object) -> float | None:
    """Return a number that is finite; None for all else, such as the NaN of a log that another program wrote."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if -_LARGEST < value < _LARGEST else None


def plain(text: str) -> str:
    """Make a text of unknown origin short and printable: it goes to terminals, figures and pages."""
    if len(text) <= _LONGEST_TEXT and text.isprintable():
        return text
    short = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …"
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in short)


def column(rows: Sequence[Row], key: str) -> NDArray[np.float64]:
    """Take one number per row, NaN where the row has none (missing, or null for non-finite)."""
    values = (row.get(key) for row in rows)
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def noise_scales(record: RunRecord, end: str) -> NDArray[np.float64]:
    """Return a figure of the noise scale for every training row, positive.

    A row where it is not resolved has the last one that was before it, or else the first after it.

    Args:
        record: at least one row of it is resolved.
        end: "value", "lower" or "upper".
    """
    values = np.array(
        [row[f"noise_scale/{end}"] if is_resolved(row) else np.nan for row in record.train], dtype=np.float64
    )
    known = np.flatnonzero(np.isfinite(values))
    latest = known[np.maximum(np.searchsorted(known, np.arange(len(values)), side="right") - 1, 0)]
    return np.maximum(values[latest], np.finfo(np.float64).tiny)


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
    # Differences of a running sum, so that a run of a million rows takes no longer than a look at each. Taken about
    # the middle of the values, whose size would else drown their differences.
    middle = np.median(values) if len(values) else 0.0
    sums = np.concatenate([[0.0], np.cumsum(values - middle)])
    means: NDArray[np.float64] = middle + (sums[ends] - sums[begins]) / (ends - begins)
    return means
