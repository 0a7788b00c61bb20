"""What replicas exchange in a step: gradients, compressed gradients, coefficients, parameters now and then."""

from dptrain.exchange.all_reduce import AllReduce
from dptrain.exchange.base import Exchange
from dptrain.exchange.compressed import Compressed
from dptrain.exchange.local_updates import LocalUpdates
from dptrain.exchange.random_bases import RandomBases
from dptrain.exchange.running_statistics import RunningStatistics

__all__ = [
    "AllReduce",
    "Compressed",
    "Exchange",
    "LocalUpdates",
    "RandomBases",
    "RunningStatistics",
]
