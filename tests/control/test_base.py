"""The interface of control: states that travel as JSON, decisions that are sane."""

import json
from dataclasses import asdict

import pytest

from dptrain.control import BatchSizeGrid, Measurement, OnGrid
from dptrain.control.base import Decision
from dptrain.control.noise_law import NoiseLaw
from dptrain.control.schedule import Constant, Schedule, Stage
from dptrain.errors import CheckpointError
from tests.control.known import Known

LAWS = [Constant(64), Schedule((Stage(0, 8), Stage(100, 64))), NoiseLaw()]
LIMITED = [OnGrid(law, BatchSizeGrid(quantum=8, largest=64)) for law in LAWS]


def measured(samples_seen, batch):
    return Measurement(
        samples_seen=samples_seen, global_batch_size=batch, noise_scale=Known(100.0, num_steps=samples_seen)
    )


@pytest.mark.parametrize("controller", LIMITED, ids=repr)
def test_state_survives_json(controller):
    """The state of any controller is the same after a trip through JSON text, at every decision."""
    state = controller.init()
    for samples_seen, batch in [(0, 8), (60, 8), (120, 64), (180, 64)]:
        state, _ = controller.update(state, measured(samples_seen, batch))
        assert controller.restore(json.loads(json.dumps(asdict(state)))) == state


def test_foreign_state_is_refused():
    """A record saved under other controller settings is refused in both directions, not half read."""
    remembering = asdict(NoiseLaw().init())
    with pytest.raises(CheckpointError, match="Constant"):
        LAWS[0].restore(remembering)
    for foreign in ({}, {"pause": 3}, {**remembering, "pause": 3}):
        with pytest.raises(CheckpointError, match="NoiseLaw"):
            NoiseLaw().restore(foreign)


@pytest.mark.parametrize("batch", [0, -1, float("nan"), float("inf")])
def test_decision_is_a_batch(batch):
    """No decision can carry a batch that is not a positive finite number."""
    with pytest.raises(AssertionError):
        Decision(global_batch_size=batch, reason="")
