"""DECIDE: (state, measurement) in, (state, decision with its reason) out; pure, and the same on every rank."""

from dptrain.control.base import Controller, Decision, Measurement, State, state_to_json
from dptrain.control.batch_scaling import (
    DEFAULT_RATE_RULE,
    PER_SAMPLE,
    Betas,
    adam_betas,
    check_scaling,
    weight_decay_factor,
)
from dptrain.control.contrib.kaplan import KaplanLaw, critical_batch_tokens
from dptrain.control.contrib.pollux import PolluxLaw
from dptrain.control.contrib.seesaw import SeesawLaw, StaircaseSchedule
from dptrain.control.goodput import GoodputLaw
from dptrain.control.grid import BatchSizeGrid
from dptrain.control.learning_rate import RULES, LearningRateRule, LearningRateSchedule, RateCheck, RuleName
from dptrain.control.limits import Limits, limited
from dptrain.control.noise_law import NoiseLaw
from dptrain.control.progress_rate import CriticalRatio
from dptrain.control.schedule import Constant, Schedule
from dptrain.control.step_time import StepTimes
from dptrain.control.step_time_model import StepShape, StepTimeModel

__all__ = [
    "DEFAULT_RATE_RULE",
    "PER_SAMPLE",
    "RULES",
    "BatchSizeGrid",
    "Betas",
    "Constant",
    "Controller",
    "CriticalRatio",
    "Decision",
    "GoodputLaw",
    "KaplanLaw",
    "LearningRateRule",
    "LearningRateSchedule",
    "Limits",
    "Measurement",
    "NoiseLaw",
    "PolluxLaw",
    "RateCheck",
    "RuleName",
    "Schedule",
    "SeesawLaw",
    "StaircaseSchedule",
    "State",
    "StepShape",
    "StepTimeModel",
    "StepTimes",
    "adam_betas",
    "check_scaling",
    "critical_batch_tokens",
    "limited",
    "state_to_json",
    "weight_decay_factor",
]
