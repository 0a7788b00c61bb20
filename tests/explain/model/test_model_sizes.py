"""Sizes that the compute of a run would pay for, against the law's own equation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptrain.explain.model.model_sizes import nearest_size, optimal_sizes, paid_sizes
from tests.ideal_runs import ideal_record


def _run(task="gpt-tiny", **facts):
    record = ideal_record(summary={"task": task, "device": "cpu"})
    return replace(record, facts={"num_parameters": 459_392, "tokens_per_sample": 64, **facts})


def test_the_sizes_spend_the_budget():
    """6·N·D is the budget for both laws; Chinchilla's own 5.76e23 FLOPs pay for 40 billion parameters by approach 3."""
    for size in optimal_sizes(5.76e23):
        assert 6 * size.num_parameters * size.num_tokens == pytest.approx(5.76e23)
    by_law = {size.law: size.num_parameters for size in optimal_sizes(5.76e23)}
    assert by_law["Hoffmann 2022"] == pytest.approx(40e9, rel=0.2)


def test_a_run_is_shown_beside_what_its_compute_pays_for():
    """40,000 samples of 64 tokens are 2.56 million, outside of what the laws were fitted to."""
    found = paid_sizes(_run(), flops=7.05e12, num_samples=40_000)
    assert (found.num_parameters, found.num_tokens) == (459_392, 2_560_000)
    assert not found.is_fitted
    assert paid_sizes(_run(), flops=1e20, num_samples=40_000).is_fitted
    assert (found.family, found.nearest) == ("gpt", "tiny")


@pytest.mark.parametrize(
    ("number", "name"), [(1e3, "tiny"), (4.6e5, "tiny"), (1.2e8, "124m"), (3e8, "350m"), (1e12, "1.5b")]
)
def test_the_nearest_ready_made_size(number, name):
    """By ratio."""
    assert nearest_size(number) == name


@pytest.mark.parametrize(
    ("task", "facts"), [("digits-mlp", {"tokens_per_sample": None}), ("gpt-tiny", {"num_parameters": None})]
)
def test_no_law_applies_to_other_models(task, facts):
    """Nor to a run that does not tell its sizes, or was not counted."""
    assert paid_sizes(_run(task, **facts), flops=1e20, num_samples=1) is None
    assert paid_sizes(_run(), flops=None, num_samples=1) is None


def test_a_model_of_another_kind_has_no_family():
    """An LSTM on the same text."""
    assert paid_sizes(_run("pysource-lstm"), flops=1e20, num_samples=1).nearest is None
