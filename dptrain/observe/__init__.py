"""OBSERVE: what each replica's own gradient was against the combined one; never changes a gradient."""

from dptrain.observe.attach import attach
from dptrain.observe.ddp_tap import DdpTap
from dptrain.observe.meter import NUM_SUMS, Meter, MeterState, Reading
from dptrain.observe.parameter_tap import ParameterTap
from dptrain.observe.reduction import PendingSum

__all__ = ["NUM_SUMS", "DdpTap", "Meter", "MeterState", "ParameterTap", "PendingSum", "Reading", "attach"]
