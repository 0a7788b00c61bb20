"""OBSERVE: what each replica's own gradient was against the combined one; never changes a gradient."""

from dptrain.observe.attach import attach
from dptrain.observe.ddp_tap import DdpTap
from dptrain.observe.estimate import NUM_SIZES, NUM_SUMS, MeterState
from dptrain.observe.guard import Guard
from dptrain.observe.meter import Meter
from dptrain.observe.observer import Observer
from dptrain.observe.pace import Pace
from dptrain.observe.parameter_tap import ParameterTap
from dptrain.observe.reading import Reading
from dptrain.observe.reduction import PendingSum

__all__ = [
    "NUM_SIZES",
    "NUM_SUMS",
    "DdpTap",
    "Guard",
    "Meter",
    "MeterState",
    "Observer",
    "Pace",
    "ParameterTap",
    "PendingSum",
    "Reading",
    "attach",
]
