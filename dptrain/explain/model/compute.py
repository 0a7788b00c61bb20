"""The arithmetic of compute: FLOPs of a training by two methods, and sizes that are optimal for a budget of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dptrain.cost.ledger import PETAFLOP_S_DAY
from dptrain.errors import ConfigError

UTILISATION = 0.33
"""Share of the peak that a GPU is taken to reach where nobody measured it (Amodei and Hernandez 2018, see below)."""


def flops_by_count(*, macs_per_sample: float, num_samples: float) -> float:
    """Return the FLOPs of a training: 2 per multiply-add × 3 for forward and backward × multiply-adds × samples.

    The first of two methods of Amodei and Hernandez 2018 ("AI and Compute", OpenAI, appendix), who take each to be
    right within a factor of 2 to 3.

    Args:
        macs_per_sample: multiply-adds of one forward pass of one sample.
        num_samples: seen in training, each as often as it was seen.
    """
    return 2 * 3 * macs_per_sample * num_samples


def flops_by_time(
    *, num_devices: float, peak_flops_per_s: float, seconds: float, utilisation: float = UTILISATION
) -> float:
    """Return the FLOPs of a training: devices × peak × time × utilisation; the second method, see `flops_by_count`.

    Args:
        num_devices: that trained.
        peak_flops_per_s: of one device.
        seconds: of training.
        utilisation: share of the peak that was reached.
    """
    return num_devices * peak_flops_per_s * seconds * utilisation


DOUBLING_MONTHS = 3.4
"""Of the compute of the largest trainings, 2012 to 2018 (Amodei and Hernandez 2018, "AI and Compute", OpenAI)."""
ALEXNET_PETAFLOP_S_DAYS = 0.0058
"""The first point of that trend: 2 GPUs × 5.5 days × 1.58 TFLOP/s × 0.33, in the appendix of the article."""
_ALEXNET_YEAR = 2012 + 8.5 / 12  # September 2012
_WHOLE_GROWTH = 3e5
"""From AlexNet to AlphaGo Zero, the last point of the trend: "more than 300,000 times"."""


@dataclass(frozen=True, kw_only=True)
class TrendPlace:
    """Where an amount of compute lies on the trend of "AI and Compute".

    Attributes:
        petaflop_s_days: the amount.
        doublings: from AlexNet to it; negative below.
        year: with its fraction, in which the largest trainings took as much; None outside of the article's years,
            which the trend says nothing of.
    """

    petaflop_s_days: float
    doublings: float
    year: float | None


def trend_place(flops: float) -> TrendPlace:
    """Return where a training of so many FLOPs, more than 0, lies on the trend."""
    days = flops / PETAFLOP_S_DAY
    growth = days / ALEXNET_PETAFLOP_S_DAYS
    doublings = math.log2(growth)
    year = _ALEXNET_YEAR + doublings * DOUBLING_MONTHS / 12 if 1 <= growth <= _WHOLE_GROWTH else None
    return TrendPlace(petaflop_s_days=days, doublings=doublings, year=year)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """The compute of a training by both methods.

    Attributes:
        by_count: FLOPs that were counted; None where they were not.
        by_time: FLOPs by time of devices; None where their peak is not known.
    """

    by_count: float | None
    by_time: float | None

    @property
    def disagreement(self) -> float | None:
        """The larger over the smaller, at least 1; None where one is not known."""
        if not (self.by_count and self.by_time):
            return None
        return max(self.by_count, self.by_time) / min(self.by_count, self.by_time)


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """The loss of a language model by its size: L = E + A/N^α + B/D^β, in nats per token.

    Attributes:
        source: of the coefficients.
        floor: E, what no model gets below.
        model_scale: A.
        data_scale: B.
        model_exponent: α.
        data_exponent: β.
    """

    source: str
    floor: float
    model_scale: float
    data_scale: float
    model_exponent: float
    data_exponent: float

    def loss(self, *, num_parameters: float, num_tokens: float) -> float:
        """Return the loss of a model of N parameters after D tokens."""
        by_model = self.model_scale / num_parameters**self.model_exponent
        by_data = self.data_scale / num_tokens**self.data_exponent
        return float(self.floor + by_model + by_data)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return the numbers of parameters and of tokens that reach the least loss with a budget of 6·N·D FLOPs.

        Hoffmann et al. 2022 (arXiv 2203.15556), equation 4.

        Raises:
            ConfigError: where `flops` is not positive.
        """
        if not flops > 0:
            raise ConfigError(f"a budget must be a positive number of FLOPs, such as 1e21, got {flops!r}")
        a, b = self.model_exponent, self.data_exponent
        ratio = (a * self.model_scale / (b * self.data_scale)) ** (1 / (a + b))
        num_parameters = ratio * (flops / 6) ** (b / (a + b))
        return float(num_parameters), float(flops / 6 / num_parameters)


SCALING_LAWS: Mapping[str, ScalingLaw] = MappingProxyType(
    {
        "Besiroglu 2024": ScalingLaw(
            source="Besiroglu et al. 2024, arXiv 2404.10102",
            floor=1.8172,
            model_scale=482.01,
            data_scale=2085.43,
            model_exponent=0.3478,
            data_exponent=0.3658,
        ),
        "Hoffmann 2022": ScalingLaw(
            source="Hoffmann et al. 2022, arXiv 2203.15556, approach 3",
            floor=1.69,
            model_scale=406.4,
            data_scale=410.7,
            model_exponent=0.34,
            data_exponent=0.28,
        ),
    }
)
"""Two fits to the same runs. The later one found the earlier at odds with its own data; both are shown."""
