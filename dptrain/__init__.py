"""Data-parallel training that measures the gradient noise scale while it trains."""

from dptrain.version import __version__

__all__ = ["__version__"]
