"""The constant law."""

import pytest

from dptrain.control import Constant, Measurement
from dptrain.errors import ConfigError


@pytest.mark.parametrize("batch", [1, 64, 4096])
def test_constant_ignores_everything(batch):
    """The constant law asks for its batch from every batch in force, without looking at the measurement."""
    decision = Constant(64).decide(Measurement(samples_seen=10, global_batch_size=batch, noise_scale=None))
    assert decision.global_batch_size == 64
    assert "64" in decision.reason


def test_constant_rejects_an_empty_batch():
    """A batch of no samples is refused with its value in the text."""
    with pytest.raises(ConfigError, match="got 0"):
        Constant(0)
