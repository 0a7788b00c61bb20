"""Random training loops against per-sample gradients: no silent wrong number, no false alarm."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.misuse.random_loops import (
    CHOICES,
    CORRECT,
    MISUSES,
    Loop,
    drawn,
    is_false_alarm,
    is_silent_wrong,
    possible,
    run,
)
from tests.replicas import run_replicas

QUIET = settings(max_examples=120, suppress_health_check=list(HealthCheck), derandomize=True)


def loops(misuses):
    """Loops in one process, with any settings that go together."""
    fields = {name: st.sampled_from(values) for name, values in CHOICES.items() if name != "in_ddp"}
    drawn_loops = st.builds(
        Loop, misuse=st.sampled_from(misuses), in_ddp=st.just(False), seed=st.integers(0, 9), **fields
    )
    return drawn_loops.map(possible).filter(lambda loop: not loop.in_ddp)


@QUIET
@given(loops((CORRECT,)))
def test_a_correct_loop_is_right_and_raises_no_alarm(loop):
    """Whatever the order of calls, clipping, scaler, skipped steps and forms of zero_grad."""
    outcome = run(loop, rank=0, world_size=1)
    assert not is_false_alarm(outcome), outcome
    assert outcome.num_wrong == 0, outcome


@QUIET
@given(loops(MISUSES))
def test_a_misused_loop_gives_no_silent_wrong_number(loop):
    """What is measured is right, or a warning is given."""
    outcome = run(loop, rank=0, world_size=1)
    assert not is_silent_wrong(outcome), outcome


NUM_SEEDS = 60


def run_in_ddp(rank, world_size):
    bad = []
    for seed in range(NUM_SEEDS):
        for misuse in (CORRECT, MISUSES[seed % len(MISUSES)]):
            loop = drawn(seed, misuse=misuse)
            if not loop.in_ddp:
                continue
            outcome = run(loop, rank=rank, world_size=world_size)
            wrong = is_silent_wrong(outcome) if misuse != CORRECT else is_false_alarm(outcome) or outcome.num_wrong
            if wrong:
                bad.append((loop, outcome))
    return bad


def test_the_same_holds_on_two_replicas():
    """In DDP, by either method, with and without no_sync."""
    assert run_replicas(run_in_ddp, world_size=2, timeout_s=240)[0] == []
