"""ESTIMATE: squared norms in, |G|², tr(Σ) and the noise scale with its interval out; pure, no torch, no ranks."""

from dptrain.noise.moments import Moments, unbiased_moments
from dptrain.noise.present import PresentState, present_moments, present_updated
from dptrain.noise.scale import NoiseScale, Resolution, noise_scale
from dptrain.noise.smoothing import MomentSums, SmoothedMoments, Smoothing, smoothed
from dptrain.noise.stats import SquaredNorms

__all__ = [
    "MomentSums",
    "Moments",
    "NoiseScale",
    "PresentState",
    "Resolution",
    "SmoothedMoments",
    "Smoothing",
    "SquaredNorms",
    "noise_scale",
    "present_moments",
    "present_updated",
    "smoothed",
    "unbiased_moments",
]
