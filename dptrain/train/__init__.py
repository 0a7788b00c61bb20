"""APPLY: a task trained on all replicas, with the batch that the measured noise asks for."""

from dptrain.checkpoint.settings import CheckpointConfig
from dptrain.config.execution import ExecutionConfig
from dptrain.config.train_config import LogConfig, OptimizerConfig, TrainConfig
from dptrain.control.settings import ControlConfig
from dptrain.noise.settings import NoiseConfig
from dptrain.train.trainer import Trainer

__all__ = [
    "CheckpointConfig",
    "ControlConfig",
    "ExecutionConfig",
    "LogConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "TrainConfig",
    "Trainer",
]
