"""The meter and the adaptive batch as callbacks of Lightning's Trainer."""

from dptrain.integrations.lightning.batch_size import AdaptiveBatchSize
from dptrain.integrations.lightning.monitor import GradientNoiseScaleMonitor

__all__ = ["AdaptiveBatchSize", "GradientNoiseScaleMonitor"]
