"""The meter (a callback) and the adaptive batch (a mixin) for the transformers Trainer."""

from dptrain.integrations.transformers.callback import NoiseScaleMonitor
from dptrain.integrations.transformers.window import BatchAdapterMixin

__all__ = ["BatchAdapterMixin", "NoiseScaleMonitor"]
