"""What replicas exchange in a step: gradients, compressed ones, coefficients, parameters, predictions, or nothing."""

from dptrain.exchange.public import __dir__ as __dir__
from dptrain.exchange.public import __getattr__ as __getattr__
