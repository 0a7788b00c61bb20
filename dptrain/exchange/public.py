"""The names of `dptrain.exchange`, each imported when it is first used."""

# Settings are read before torch is, so that the first line of a run is fast; most of these modules import torch.

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "AllReduce": "all_reduce",
    "Codistillation": "codistillation",
    "Compressed": "compressed",
    "Ensemble": "ensemble",
    "Exchange": "base",
    "ExchangeConfig": "settings",
    "LocalUpdates": "local_updates",
    "RandomBases": "random_bases",
    "RunningStatistics": "running_statistics",
    "build_exchange": "kinds",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the names above
    if name not in _HOME:
        raise AttributeError(f"module 'dptrain.exchange' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dptrain.exchange.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
