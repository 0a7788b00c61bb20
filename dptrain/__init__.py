"""Data-parallel training that measures the gradient noise scale while it trains."""

from dptrain.public import __dir__ as __dir__
from dptrain.public import __getattr__ as __getattr__
