"""Which rules of rate, betas and weight decay go together."""

import pytest

from dptrain.config.scaling_rules import PER_SAMPLE, check_scaling
from dptrain.errors import ConfigError


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        (("linear", "square_root", "none"), "beta_rule=square_root does not go with the learning-rate rule linear"),
        (("gain", "half_life", "none"), "beta_rule=half_life does not go with"),
        (("noise", "none", "timescale"), "choose gain or root_gain"),
    ],
)
def test_rules_that_do_not_fit_are_refused(rules, complaint):
    """A beta or decay rule that belongs to another rate rule is refused, with those that it belongs to."""
    with pytest.raises(ConfigError, match=complaint):
        check_scaling(rate=rules[0], betas=rules[1], decay=rules[2])


def test_the_preset_fits():
    """The rules of the preset go together, for each optimizer."""
    for rules in PER_SAMPLE.values():
        check_scaling(rate=rules["rule"], betas=rules["beta_rule"], decay=rules["decay_rule"])
