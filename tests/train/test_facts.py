"""The facts of a run are those of its task."""

from __future__ import annotations

from dataclasses import replace

import torch

from dptrain.exchange import AllReduce
from dptrain.train.facts import facts_of
from tests.runs import noisy


def test_held_out_samples_are_counted_over_all_sets():
    """One set, several sets, or none; the parameters are those of the model."""
    task = noisy()
    where = {"num_samples": 90, "exchange": AllReduce(), "device": torch.device("cpu")}
    one = facts_of(task, **where)
    assert (one.num_held_out, one.num_samples, one.num_parameters) == (90, 90, 4 * 8 + 8 + 8 + 1)
    assert (one.num_trained_parameters, one.gradient_bytes) == (one.num_parameters, 4 * one.num_parameters)
    assert facts_of(replace(task, eval_data={"a": task.eval_data, "b": task.eval_data}), **where).num_held_out == 180
    assert facts_of(replace(task, eval_data=None), **where).num_held_out is None


def test_frozen_parameters_have_no_gradient():
    """Those that are trained are counted beside all, and the bytes are those of their own type."""
    task = noisy()
    task.model[0].requires_grad_(False)
    task.model[3].to(torch.bfloat16)
    found = facts_of(task, num_samples=90, exchange=AllReduce(), device=torch.device("cpu"))
    assert (found.num_parameters, found.num_trained_parameters, found.gradient_bytes) == (49, 9, 18)
