"""DECIDE: (state, measurement) in, (state, decision with its reason) out; pure, and the same on every rank."""

from dptrain.control.adapter import Adapter
from dptrain.control.base import Controller, Decision, Law, Measurement
from dptrain.control.goodput import GoodputLaw
from dptrain.control.grid import BatchSizeGrid
from dptrain.control.learning_rate import RULES, RuleName
from dptrain.control.noise_law import NoiseLaw
from dptrain.control.on_grid import OnGrid
from dptrain.control.progress_rate import CriticalRatio
from dptrain.control.schedule import Constant, Schedule
from dptrain.control.step_time import StepTimes
from dptrain.control.step_time_model import StepTimeModel

__all__ = [
    "RULES",
    "Adapter",
    "BatchSizeGrid",
    "Constant",
    "Controller",
    "CriticalRatio",
    "Decision",
    "GoodputLaw",
    "Law",
    "Measurement",
    "NoiseLaw",
    "OnGrid",
    "RuleName",
    "Schedule",
    "StepTimeModel",
    "StepTimes",
]
