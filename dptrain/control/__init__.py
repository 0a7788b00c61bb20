"""DECIDE: (state, measurement) in, (state, decision with its reason) out; pure, and the same on every rank."""

from dptrain.control.adapter import Adapter
from dptrain.control.base import Controller, Decision, Law, Measurement
from dptrain.control.grid import BatchSizeGrid
from dptrain.control.learning_rate import RULES, RuleName
from dptrain.control.on_grid import OnGrid
from dptrain.control.progress_rate import CriticalRatio
from dptrain.control.step_time import StepTimes
from dptrain.control.step_time_model import StepTimeModel

__all__ = [
    "RULES",
    "Adapter",
    "BatchSizeGrid",
    "Controller",
    "CriticalRatio",
    "Decision",
    "Law",
    "Measurement",
    "OnGrid",
    "RuleName",
    "StepTimeModel",
    "StepTimes",
]
