"""ESTIMATE: squared norms in, |G|², tr(Σ) and the noise scale with its interval out; pure, no torch, no ranks."""

from dptrain.noise.moments import Moments, unbiased_moments
from dptrain.noise.scale import NoiseScale, Resolution, noise_scale
from dptrain.noise.smoothing import MomentSums, SmoothedMoments, Smoothing, smoothed
from dptrain.noise.stats import SquaredNorms

__all__ = [
    "MomentSums",
    "Moments",
    "NoiseScale",
    "Resolution",
    "SmoothedMoments",
    "Smoothing",
    "SquaredNorms",
    "noise_scale",
    "smoothed",
    "unbiased_moments",
]
