"""`load_run(folder)`: the metrics of a run as columns, with its decisions and its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dptrain.errors import ConfigError
from dptrain.explain.record import Row, column, read_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TEXTS = ("noise_scale/state",)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run folder as data.

    Attributes:
        name: of the folder.
        metrics: column name → one value for each logged optimizer step, float64, NaN where a step has none.
        evaluations: the same for each evaluation on held-out data.
        decisions: one mapping for each change of the batch, with its reason.
        summary: the figures of the whole run; empty where it has not ended.
        config: the settings of the run.
    """

    name: str
    metrics: Mapping[str, NDArray[Any]]
    evaluations: Mapping[str, NDArray[Any]]
    decisions: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    config: Mapping[str, Any]

    def to_pandas(self) -> Any:  # noqa: ANN401 - pandas is optional
        """Return the metrics as a pandas DataFrame, one row a step.

        Raises:
            ConfigError: where pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ConfigError("to_pandas needs pandas: pip install pandas") from error
        return pd.DataFrame(dict(self.metrics))

    def to_arrow(self) -> Any:  # noqa: ANN401 - pyarrow is optional
        """Return the metrics as a pyarrow Table, one row a step.

        Raises:
            ConfigError: where pyarrow is not installed.
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise ConfigError("to_arrow needs pyarrow: pip install 'dptrain[tasks]'") from error
        return pa.table(dict(self.metrics))


def load_run(folder: str | Path) -> RunData:
    """Return the metrics, decisions and summary of a run folder; also while the run goes on.

    Args:
        folder: of `dptrain train`.

    Raises:
        ConfigError: where there is no run in it.
    """
    record = read_run(Path(folder), most_rows=None)
    return RunData(
        name=record.name,
        metrics=_columns(record.train),
        evaluations=_columns(record.evals),
        decisions=tuple(record.decisions),
        summary=record.summary,
        config=record.config,
    )


def _columns(rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
    names = dict.fromkeys(name for row in rows for name in row if name != "kind")
    return {
        name: np.array([str(row.get(name) or "") for row in rows]) if name in _TEXTS else column(rows, name)
        for name in names
    }
