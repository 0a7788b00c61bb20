"""DECIDE: (state, measurement) in, (state, decision with its reason) out; pure, and the same on every rank."""

from dptrain.control.base import Controller, Decision, Measurement, State, state_to_json
from dptrain.control.constant import Constant
from dptrain.control.contrib.kaplan import KaplanLaw, critical_batch_tokens
from dptrain.control.contrib.norm_tolerance import NormTestLaw
from dptrain.control.contrib.pollux import PolluxLaw
from dptrain.control.contrib.seesaw import SeesawLaw, StaircaseSchedule
from dptrain.control.goodput import FastestLaw, GoodputLaw
from dptrain.control.learning_rate import (
    RULES,
    BetaRuleName,
    LearningRateRule,
    LearningRateSchedule,
    RuleName,
    adam_betas,
)
from dptrain.control.limit import BatchSizeGrid, Bounds, DeadBand, MaxChange, Rounding, ShrinkBand
from dptrain.control.limits import Limits, limited
from dptrain.control.noise_law import ExchangeRateLaw, NoiseLaw
from dptrain.control.patience import DwellState, DwellTime, Probe, ProbeState
from dptrain.control.ramp import Ramp
from dptrain.control.schedule import Schedule
from dptrain.control.step_time import StepShape, StepTimeModel, StepTimes

__all__ = [
    "RULES",
    "BatchSizeGrid",
    "BetaRuleName",
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
    "KaplanLaw",
    "LearningRateRule",
    "LearningRateSchedule",
    "Limits",
    "MaxChange",
    "Measurement",
    "NoiseLaw",
    "NormTestLaw",
    "PolluxLaw",
    "Probe",
    "ProbeState",
    "Ramp",
    "Rounding",
    "RuleName",
    "Schedule",
    "SeesawLaw",
    "ShrinkBand",
    "StaircaseSchedule",
    "State",
    "StepShape",
    "StepTimeModel",
    "StepTimes",
    "adam_betas",
    "critical_batch_tokens",
    "limited",
    "state_to_json",
]
