"""Problems that are ready to train, and problems whose answer is known exactly."""

from dptrain.tasks.base import Batch, Loss, LossFunction, Moment, Suggestion, Task, TrainHook
from dptrain.tasks.check import check_task, fewest_samples, losses_of_two_samples, warn_unless_mean
from dptrain.tasks.digits import digits
from dptrain.tasks.evaluation_check import check_evaluation
from dptrain.tasks.gpt import gpt
from dptrain.tasks.huggingface import huggingface
from dptrain.tasks.images import images
from dptrain.tasks.known import KnownAnswer, exact_noise, known_answer, linear, quadratic
from dptrain.tasks.mnist1d import mnist1d
from dptrain.tasks.patches import patches
from dptrain.tasks.pictures import pictures
from dptrain.tasks.pysource import pysource
from dptrain.tasks.resolve import BUILT_IN, resolve_task

__all__ = [
    "BUILT_IN",
    "Batch",
    "KnownAnswer",
    "Loss",
    "LossFunction",
    "Moment",
    "Suggestion",
    "Task",
    "TrainHook",
    "check_evaluation",
    "check_task",
    "digits",
    "exact_noise",
    "fewest_samples",
    "gpt",
    "huggingface",
    "images",
    "known_answer",
    "linear",
    "losses_of_two_samples",
    "mnist1d",
    "patches",
    "pictures",
    "pysource",
    "quadratic",
    "resolve_task",
    "warn_unless_mean",
]
