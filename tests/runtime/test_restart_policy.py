"""Whether an attempt is followed by another: by the kind of its end, by what it brought, and never for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.runtime.restart_policy import Attempts, RestartPolicy

TRANSIENT = [1, 3, 70, 71, 128 + 6, 128 + 9, 128 + 11]
FINAL = [0, 2, 65, 69, 74, 75, 76]


@pytest.mark.parametrize("code", TRANSIENT)
def test_what_may_pass_is_tried_again(code):
    """A crash, a hang, a signal; and the attempt is counted."""
    verdict = RestartPolicy().decide(Attempts(step=4), code=code, step=8)
    assert verdict.again
    assert verdict.attempts == Attempts(num_restarts=1, num_fruitless=1, step=8)


@pytest.mark.parametrize("code", FINAL)
def test_what_would_end_the_same_is_not(code):
    """Nor is what is done, or was stopped on request; there is nothing to explain about it."""
    verdict = RestartPolicy().decide(Attempts(), code=code, step=8)
    assert (verdict.again, verdict.reason) == (False, "")


@pytest.mark.parametrize(("step", "words"), [(8, "newer than that of step 8"), (0, "no checkpoint at all")])
def test_it_stops_after_three_restarts_without_progress(step, words):
    """Whether there is a checkpoint or none; it says which is the newest."""
    policy, attempts = RestartPolicy(), Attempts(step=step)
    for _ in range(3):
        verdict = policy.decide(attempts, code=1, step=step)
        assert verdict.again
        attempts = verdict.attempts
    verdict = policy.decide(attempts, code=1, step=step)
    assert not verdict.again
    assert "3 restarts in a row" in verdict.reason
    assert words in verdict.reason


def test_progress_makes_up_for_failures():
    """A new checkpoint gives three further restarts, an older one than before gives none."""
    policy, attempts = RestartPolicy(), Attempts(num_restarts=3, num_fruitless=3, step=8)
    assert policy.decide(attempts, code=1, step=9).again
    assert not policy.decide(attempts, code=1, step=8).again
    assert not policy.decide(attempts, code=1, step=7).again


def test_the_same_error_at_the_same_step_ends_the_run():
    """A bug is shown twice, not four times; another error, or another step, is tried again."""
    policy, bug = RestartPolicy(), "ValueError: bad sample in step 12"
    first = policy.decide(Attempts(), code=1, step=8, failure=bug)
    assert first.again
    second = policy.decide(first.attempts, code=1, step=10, failure=bug)
    assert not second.again
    assert "the same error at the same step" in second.reason
    for other in ("ValueError: bad sample in step 13", "KeyError: 3 in step 12", ""):
        assert policy.decide(first.attempts, code=1, step=10, failure=other).again
    killed = policy.decide(Attempts(), code=137, step=8)
    assert policy.decide(killed.attempts, code=137, step=8).again


def test_the_budget_is_kept_in_spite_of_progress():
    """It counts all restarts of a run; none at all is a budget too."""
    assert RestartPolicy(max_restarts=0).decide(Attempts(), code=1, step=9).reason == "--max-restarts is 0"
    assert not RestartPolicy(max_restarts=2).decide(Attempts(num_restarts=2), code=1, step=9).again


@settings(max_examples=300)
@given(
    ends=st.lists(
        st.tuples(st.sampled_from(TRANSIENT * 3 + FINAL), st.integers(min_value=0, max_value=12)), max_size=60
    ),
    max_restarts=st.none() | st.integers(min_value=0, max_value=20),
    max_fruitless=st.integers(min_value=0, max_value=4),
)
def test_invariant_16_the_policy_comes_to_an_end(ends, max_restarts, max_fruitless):
    """For any sequence of ends: budget respected, at most k restarts in a row without progress, none after a final end.

    Steps are those of a run of 12, so at most k restarts fall on each, and on the beginning.
    """
    policy = RestartPolicy(max_restarts=max_restarts, max_fruitless=max_fruitless)
    attempts, best, num_restarts, in_a_row = Attempts(), 0, 0, 0
    for code, step in ends:
        verdict = policy.decide(attempts, code=code, step=step)
        if step > best:
            best, in_a_row = step, 0
        if not verdict.again:
            assert code in FINAL or verdict.reason
            assert verdict.attempts == attempts
            break
        assert code not in FINAL
        num_restarts, in_a_row = num_restarts + 1, in_a_row + 1
        attempts = verdict.attempts
        assert in_a_row <= max_fruitless
        assert attempts.num_restarts == num_restarts
    assert max_restarts is None or num_restarts <= max_restarts
    assert num_restarts <= max_fruitless * (best + 1)
