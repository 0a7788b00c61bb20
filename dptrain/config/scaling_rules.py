"""Which rules of rate, betas and decay a run has: defaults by optimizer, the preset, what goes together, at a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dptrain.control.batch_scaling import BetaRuleName, Betas, DecayRuleName, adam_betas
from dptrain.control.learning_rate import RuleName
from dptrain.errors import ConfigError

DEFAULT_RATE_RULE: Mapping[str, RuleName] = MappingProxyType({"adamw": "root_gain", "sgd": "gain"})
"""The learning-rate rule where none is chosen, by the optimizer."""

PER_SAMPLE: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "adamw": {"rule": "root_gain", "beta_rule": "half_life", "decay_rule": "timescale"},
        "sgd": {"rule": "gain", "beta_rule": "none", "decay_rule": "timescale"},
    }
)
"""The preset with which training per sample stays the same at each batch, as far as the noise scale allows."""

_GO_WITH: Mapping[BetaRuleName, tuple[str, ...]] = {
    "none": ("none", "linear", "square_root", "gain", "root_gain", "noise", "surge"),
    "square_root": ("square_root", "root_gain"),
    "half_life": ("none", "square_root", "root_gain", "surge"),
}
"""Rate rules that each beta rule goes with. `square_root` is one half of Malladi's rule and needs the other half, the
root of the batch. `half_life` is for Adam, whose rate does not follow the batch in proportion."""


@dataclass(frozen=True, kw_only=True)
class BetaScaling:
    """A beta rule at the batch in force; each parameter group has the betas that it was tuned with.

    Attributes:
        rule: which one.
        batch: in force, in samples.
        reference_batch: that the betas were tuned at, in samples.
    """

    rule: BetaRuleName
    batch: int
    reference_batch: int

    def scaled(self, tuned: tuple[float, float]) -> Betas:
        """Return the betas in force for a pair that was tuned at the reference batch."""
        return adam_betas(self.rule, tuned, batch=self.batch, reference_batch=self.reference_batch)


def check_scaling(*, rate: str, betas: BetaRuleName, decay: DecayRuleName) -> None:
    """Refuse rules that do not go together.

    Raises:
        ConfigError: for a beta or decay rule that does not belong to the learning-rate rule.
    """
    if rate not in _GO_WITH[betas]:
        raise ConfigError(
            f"beta_rule={betas} does not go with the learning-rate rule {rate}: it belongs to "
            f"{' or '.join(_GO_WITH[betas])}"
        )
    if decay == "timescale" and rate == "noise":
        raise ConfigError(
            "decay_rule=timescale needs a rate tuned at the reference batch, and rule=noise has one for an infinite "
            "batch: choose gain or root_gain"
        )
