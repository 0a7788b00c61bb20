"""What settings make of a task before it is trained: weights to start from, rates by layer, a teacher in its loss."""

from dptrain.train.preparation.prepared_task import prepared, requested
from dptrain.train.preparation.same_training import check_same_training

__all__ = ["check_same_training", "prepared", "requested"]
