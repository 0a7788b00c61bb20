"""The public names of `dptrain`, each imported when it is first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "attach": "dptrain.observe.attach",
    "Meter": "dptrain.observe.meter",
    "Observer": "dptrain.observe.observer",
    "Reading": "dptrain.observe.reading",
    "NoiseScale": "dptrain.noise",
    "Resolution": "dptrain.noise",
    "Smoothing": "dptrain.noise",
    "noise_scale": "dptrain.noise.from_norms",
    "BatchAdapter": "dptrain.integrations.batch_adapter",
    "ElasticBatch": "dptrain.data.elastic_batch",
    "ControlConfig": "dptrain.control.settings",
    "Trainer": "dptrain.train.trainer",
    "TrainConfig": "dptrain.config.train_config",
    "OptimizerConfig": "dptrain.config.train_config",
    "LogConfig": "dptrain.config.train_config",
    "NoiseConfig": "dptrain.noise.settings",
    "CheckpointConfig": "dptrain.checkpoint.settings",
    "Task": "dptrain.tasks.base",
    "Suggestion": "dptrain.tasks.base",
    "RunData": "dptrain.explain.run_data",
    "load_run": "dptrain.explain.run_data",
    "DptrainError": "dptrain.errors",
    "ConfigError": "dptrain.errors",
    "CheckpointError": "dptrain.errors",
    "ObservationError": "dptrain.errors",
    "TaskError": "dptrain.errors",
    "__version__": "dptrain.version",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name; `__init__.pyi` has the types
    if name not in _HOME:
        raise AttributeError(f"module 'dptrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
