"""The meter (a callback) and the adaptive batch (a mixin) for the transformers Trainer."""

from dptrain.integrations.transformers.callback import GradientNoiseScaleCallback
from dptrain.integrations.transformers.window import AdaptiveBatchMixin

__all__ = ["AdaptiveBatchMixin", "GradientNoiseScaleCallback"]
