"""Data-parallel training that measures the gradient noise scale while it trains."""

from dptrain.noise import NoiseScale, Resolution, Smoothing
from dptrain.observe import Meter, Observer, Reading, attach
from dptrain.version import __version__

__all__ = ["Meter", "NoiseScale", "Observer", "Reading", "Resolution", "Smoothing", "__version__", "attach"]
