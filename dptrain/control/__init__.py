"""DECIDE: (state, measurement) in, (state, decision with its reason) out; pure, and the same on every rank."""

from dptrain.control.base import Controller, Decision, Measurement, State, state_to_json
from dptrain.control.constant import Constant
from dptrain.control.goodput import FastestLaw, GoodputLaw
from dptrain.control.learning_rate import RULES, LearningRateRule, LearningRateSchedule, RuleName
from dptrain.control.limit import (
    Bounds,
    DeadBand,
    DwellState,
    DwellTime,
    Ladder,
    Limits,
    MaxChange,
    Rounding,
    limited,
)
from dptrain.control.noise import ExchangeRateLaw, NoiseLaw
from dptrain.control.schedule import Schedule
from dptrain.control.step_time import StepShape, StepTimeModel, StepTimes

__all__ = [
    "RULES",
    "Bounds",
    "Constant",
    "Controller",
    "DeadBand",
    "Decision",
    "DwellState",
    "DwellTime",
    "ExchangeRateLaw",
    "FastestLaw",
    "GoodputLaw",
    "Ladder",
    "LearningRateRule",
    "LearningRateSchedule",
    "Limits",
    "MaxChange",
    "Measurement",
    "NoiseLaw",
    "Rounding",
    "RuleName",
    "Schedule",
    "State",
    "StepShape",
    "StepTimeModel",
    "StepTimes",
    "limited",
    "state_to_json",
]
