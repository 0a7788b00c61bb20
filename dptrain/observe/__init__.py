"""OBSERVE: what each replica's own gradient was against the averaged one; never changes a gradient."""

from dptrain.observe.attach import attach
from dptrain.observe.checks.duplicate_data_check import DuplicateDataCheck
from dptrain.observe.estimate import NUM_SIZES, NUM_SUMS, MeterState
from dptrain.observe.hooks.ddp import DdpCommHook
from dptrain.observe.hooks.parameter import ParameterHook
from dptrain.observe.measurement_interval import MeasurementInterval
from dptrain.observe.meter import Meter
from dptrain.observe.observer import Observer
from dptrain.observe.reading import Reading
from dptrain.observe.reduction import PendingSum

__all__ = [
    "NUM_SIZES",
    "NUM_SUMS",
    "DdpCommHook",
    "DuplicateDataCheck",
    "MeasurementInterval",
    "Meter",
    "MeterState",
    "Observer",
    "ParameterHook",
    "PendingSum",
    "Reading",
    "attach",
]
