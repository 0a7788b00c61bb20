"""The course of an examination where ranks come at odd times; a store in this process takes the place of rank 0's."""

from __future__ import annotations

import json

import pytest
from torch.distributed import HashStore

from dptrain.runtime.doctor.examination import Request, _Course, _StoppedError
from dptrain.runtime.doctor.place import Place


def test_a_rank_that_comes_after_the_roll_says_so(tmp_path):
    """It is not one of those that call each other, and rank 0 does not wait for it to leave."""
    place = Place(rank=1, world_size=3, local_rank=0, local_world_size=1, address="127.0.0.1", port=1)
    course = _Course(place, Request(run_dir=tmp_path, wants_gpu=False, wait_s=2.5))
    store = HashStore()
    store.set("roll", json.dumps({"missing": [1]}))
    with pytest.raises(_StoppedError):
        course._follow(store, {"token": "00", "mark": None})
    (finding,) = course.report().findings
    assert finding.text == "rank 1 came after rank 0 had waited 2.5 s for all ranks"
    assert finding.remedy == "start all ranks within that time, or raise --wait"
    assert course.report().code != 0
    assert store.add("left", 0) == 0
