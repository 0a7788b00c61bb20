"""The seam of control: states that travel as JSON, decisions that are sane."""

import json
from types import SimpleNamespace

import pytest

from dptrain.control import Bounds, Constant, DwellTime, Measurement, NoiseLaw, Schedule, state_to_json
from dptrain.control.base import Decision
from dptrain.errors import CheckpointError

LAWS = [Constant(64), Schedule.parse("0:8 100:64"), NoiseLaw()]
NESTED = [
    *LAWS,
    Bounds(LAWS[0], smallest=1, largest=128),
    DwellTime(Bounds(LAWS[1], smallest=1, largest=128), samples=50),
    DwellTime(DwellTime(LAWS[1], decisions=3), samples=50),
]


def measured(samples_seen, batch):
    unknown = SimpleNamespace(bounds=lambda _z: (0.0, float("inf")), contrast=lambda _phi: 0.0)
    return Measurement(samples_seen=samples_seen, global_batch_size=batch, noise_scale=unknown)


@pytest.mark.parametrize("controller", NESTED, ids=repr)
def test_state_survives_json(controller):
    """The state of any nest of controllers is the same after a trip through JSON text, at every decision."""
    state = controller.init()
    for samples_seen, batch in [(0, 8), (60, 8), (120, 64), (180, 64)]:
        state, _ = controller.update(state, measured(samples_seen, batch))
        assert controller.restore(json.loads(json.dumps(state_to_json(state)))) == state


def test_foreign_state_is_refused():
    """A record saved under other controller settings is refused in both directions, not half read."""
    dwell = DwellTime(LAWS[0], samples=50)
    with pytest.raises(CheckpointError, match="dwell time"):
        dwell.restore({})
    with pytest.raises(CheckpointError, match="Constant"):
        LAWS[0].restore(state_to_json(dwell.init()))


@pytest.mark.parametrize("batch", [0, -1, float("nan"), float("inf")])
def test_decision_is_a_batch(batch):
    """No decision can carry a batch that is not a positive finite number."""
    with pytest.raises(AssertionError):
        Decision(global_batch_size=batch, reason="")
