"""What is called beside the steps of a run."""

from dptrain.train.hooks.early_stopping import EarlyStopping
from dptrain.train.hooks.run_hooks import build_hooks, wants_end
from dptrain.train.hooks.sparse_training import SparseTraining
from dptrain.train.hooks.weight_average import WeightAverage

__all__ = ["EarlyStopping", "SparseTraining", "WeightAverage", "build_hooks", "wants_end"]
