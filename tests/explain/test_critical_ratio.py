"""One critical ratio: law, plan and report of one run mean the same critical batch size."""

import re
from dataclasses import replace

import pytest

from dptrain.config.built import controller
from dptrain.config.filled_in import filled_in
from dptrain.control.settings import ControlConfig
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.plan import make_plan
from dptrain.explain.model.run_placement import critical_ratio, position
from dptrain.explain.text.recommendation import advise
from dptrain.tasks import Suggestion
from dptrain.train import TrainConfig
from tests.ideal_runs import ideal_record


@pytest.mark.parametrize("ratio", [None, 1.0, 3.0])
def test_law_plan_and_report_take_the_same_ratio(ratio):
    """By default and as set: the prior of the law, the plan's critical batch and the batch that the report names."""
    record = replace(ideal_record(), config={"control": {"critical_ratio": ratio}})

    settings = TrainConfig(task="digits", control=ControlConfig(critical_ratio=ratio))
    suggestion = Suggestion(
        learning_rate=0.1, global_batch_size=16, micro_batch_size=8, max_samples=9000, eval_every_samples=500
    )
    law = controller(filled_in(settings, suggestion, world_size=2), world_size=2).inner
    assert law.critical_ratio.median == critical_ratio(record) == (ratio or 1.0)

    placed = position(record)
    plan = make_plan(record, devices(record))
    critical = critical_ratio(record) * placed.implied.noise_scale
    assert plan.twice_both == pytest.approx(critical, rel=0.35)  # up to its target; the report averages to the end
    named = int(re.search(r"about ([\d,]+) samples", advise(record)[0])[1].replace(",", ""))
    assert 1 / 2**0.51 <= named / critical <= 2**0.51  # the nearest power of two
