from dptrain.exchange.all_reduce import AllReduce
from dptrain.exchange.base import Exchange
from dptrain.exchange.codistillation import Codistillation
from dptrain.exchange.compressed import Compressed
from dptrain.exchange.ensemble import Ensemble
from dptrain.exchange.kinds import build_exchange
from dptrain.exchange.local_updates import LocalUpdates
from dptrain.exchange.random_bases import RandomBases
from dptrain.exchange.running_statistics import RunningStatistics
from dptrain.exchange.settings import ExchangeConfig

__all__ = [
    "AllReduce",
    "Codistillation",
    "Compressed",
    "Ensemble",
    "Exchange",
    "ExchangeConfig",
    "LocalUpdates",
    "RandomBases",
    "RunningStatistics",
    "build_exchange",
]
