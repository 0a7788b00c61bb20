"""Ends a run whose held-out figure has stopped improving."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dptrain.config.train_config import EarlyStoppingConfig
from dptrain.errors import ConfigError
from dptrain.tasks.base import Moment, TrainHook


class EarlyStopping(TrainHook):
    """Counts the evaluations since the best one.

    Args:
        config: with a patience.
    """

    def __init__(self, config: EarlyStoppingConfig) -> None:
        assert config.patience is not None, "without a patience there is nothing to wait for"
        self._config = config
        self._patience = config.patience
        self._best: float | None = None
        self._num_since = 0

    def on_evaluation(self, moment: Moment, figures: Mapping[str, float]) -> bool:  # noqa: ARG002 - the hook's form
        """Return whether the figure is no better than the best for the patience-th time in a row."""
        name = self._config.figure
        if name not in figures:
            raise ConfigError(f"early_stopping.figure {name!r} is none of this task's: {', '.join(figures)}")
        value = -figures[name] if self._config.higher_is_better else figures[name]
        # No value is better than one that is no number, were that the first, and none is finite below minus infinity.
        if math.isfinite(value) and (self._best is None or value < self._best - self._config.min_improvement):
            self._best, self._num_since = value, 0
        else:
            self._num_since += 1
        return self._num_since >= self._patience

    def state_dict(self) -> Mapping[str, Any]:
        """Return the best figure and the count since then."""
        return {"best": self._best, "num_since": self._num_since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._best, self._num_since = state["best"], state["num_since"]
