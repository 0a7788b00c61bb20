"""Networks that tasks build: the GPT family and its mixture of experts."""

from dptrain.models.experts import ExpertsConfig, MixtureOfExperts
from dptrain.models.gpt import SIZES, Gpt, GptConfig

__all__ = ["SIZES", "ExpertsConfig", "Gpt", "GptConfig", "MixtureOfExperts"]
