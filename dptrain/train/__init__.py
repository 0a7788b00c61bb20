"""APPLY: a task trained on all replicas, with the batch that the measured noise asks for."""

from dptrain.train.config import (
    CheckpointConfig,
    ControlConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
)
from dptrain.train.trainer import Trainer

__all__ = [
    "CheckpointConfig",
    "ControlConfig",
    "LogConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "TrainConfig",
    "Trainer",
]
