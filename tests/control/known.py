"""Noise scales of which the whole confidence distribution is known, for laws and rules."""

import math
from dataclasses import dataclass

from dptrain.noise import NoiseScale, Resolution


@dataclass(frozen=True)
class Known:
    """A noise scale whose logarithm is normal: `spread` is the factor of one standard deviation."""

    median: float
    spread: float = 1.0
    num_steps: int = 100

    def bounds(self, z):
        """Its quantiles at −z and z."""
        return self.median / self.spread**z, self.median * self.spread**z

    @property
    def value(self):
        """The median."""
        return self.median

    @property
    def state(self):
        """What may be said, by value and lower end."""
        if self.value is not None:
            return Resolution.RESOLVED
        return Resolution.AT_LEAST if self.lower > 0 else Resolution.NOT_RESOLVED

    __str__ = NoiseScale.__str__

    @property
    def lower(self):
        """The quantile at −2."""
        return self.bounds(2)[0]

    @property
    def upper(self):
        """The quantile at 2."""
        return self.bounds(2)[1]


@dataclass(frozen=True)
class AtLeast(Known):
    """A noise scale that is open above from `open_from` standard deviations on."""

    open_from: float = 0.5

    def bounds(self, z):
        """Its quantiles at −z and z, the upper one infinite beyond `open_from`."""
        lower, upper = super().bounds(z)
        return lower, math.inf if z >= self.open_from else upper

    @property
    def value(self):
        """Not known."""
        return None


@dataclass(frozen=True)
class Unknown(Known):
    """A noise scale of which nothing is known."""

    median: float = 1.0

    def bounds(self, _z):
        """Everything."""
        return 0.0, math.inf

    @property
    def value(self):
        """Not known."""
        return None
