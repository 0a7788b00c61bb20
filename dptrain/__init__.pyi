# The types of the public names, for checkers and editors; `public.py` imports them when they are used.

from dptrain.checkpoint.settings import CheckpointConfig as CheckpointConfig
from dptrain.config.train_config import LogConfig as LogConfig
from dptrain.config.train_config import OptimizerConfig as OptimizerConfig
from dptrain.config.train_config import TrainConfig as TrainConfig
from dptrain.control.settings import ControlConfig as ControlConfig
from dptrain.errors import CheckpointError as CheckpointError
from dptrain.errors import ConfigError as ConfigError
from dptrain.errors import DptrainError as DptrainError
from dptrain.errors import ObservationError as ObservationError
from dptrain.errors import TaskError as TaskError
from dptrain.explain.run_data import RunData as RunData
from dptrain.explain.run_data import load_run as load_run
from dptrain.integrations.batch_adapter import BatchAdapter as BatchAdapter
from dptrain.noise import NoiseScale as NoiseScale
from dptrain.noise import Resolution as Resolution
from dptrain.noise import Smoothing as Smoothing
from dptrain.noise.from_norms import noise_scale as noise_scale
from dptrain.observe.attach import attach as attach
from dptrain.observe.meter import Meter as Meter
from dptrain.observe.observer import Observer as Observer
from dptrain.observe.reading import Reading as Reading
from dptrain.observe.settings import NoiseConfig as NoiseConfig
from dptrain.tasks.base import Suggestion as Suggestion
from dptrain.tasks.base import Task as Task
from dptrain.train.trainer import Trainer as Trainer
from dptrain.version import __version__ as __version__
