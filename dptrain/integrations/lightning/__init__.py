"""The meter and the adaptive batch as callbacks of Lightning's Trainer."""

from dptrain.integrations.lightning.batch_size import BatchAdapter
from dptrain.integrations.lightning.monitor import NoiseScaleMonitor

__all__ = ["BatchAdapter", "NoiseScaleMonitor"]
