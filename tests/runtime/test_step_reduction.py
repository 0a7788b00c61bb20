"""What replicas agree on: sums that add up, a desync that is found, an error that all learn of."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dptrain.errors import AbortedError, ConfigError, DesyncError, PeerLostError
from dptrain.observe import NUM_SUMS
from dptrain.observe.measurement_interval import NUM_TIMINGS
from dptrain.runtime.rendezvous import collective_timeout_s
from dptrain.runtime.step_reduction import (
    RankReport,
    StepRecord,
    on_rank_0,
    receive,
    send,
    translate_peer_errors,
    wait_together,
)
from tests.replicas import run_replicas

RECORD = StepRecord(step=7, position=96, global_batch_size=16, micro_batch_size=4, learning_rate=0.1, wall_s=1.0)


def agree(record, *, report=RankReport(), loss_sum=8.0, small=1.0, large=9.0, measured=True):  # noqa: B008 - frozen
    # A meter's sums begin with the squares of this replica's own gradients.
    sums = torch.zeros(NUM_SUMS + NUM_TIMINGS, dtype=torch.float64)
    sums[0] = small
    pending = send(
        record,
        report=report,
        loss_sum=torch.tensor(loss_sum),
        num_samples=record.global_batch_size // 2,
        grad_norm=torch.tensor(large).sqrt(),
        meter_sums=sums,
        measured=measured,
    )
    return receive(pending, record)


def agree_in_many_ways(rank, world_size):
    outcomes = {
        "plain": agree(RECORD, report=RankReport(energy_j=1.5, step_s=0.1 + 0.2 * rank), loss_sum=8.0 + 16.0 * rank),
        "paused": agree(RECORD, report=RankReport(energy_j=math.nan if rank else 1.0, step_s=None if rank else 0.1)),
        "stop": agree(RECORD, report=RankReport(stop=rank == 1)),
        "save": agree(RECORD, report=RankReport(save=rank == 0, failed_saves=2 * (rank == 0), busy_s=1.0 + rank)),
        "slow": agree(RECORD, report=RankReport(slowness=1.5 * (rank == 1), folder_removed=rank == 0)),
        "local": agree(RECORD, small=math.nan if rank == 1 else 1.0),
        "nan": agree(RECORD, large=math.nan if rank == 1 else 9.0),
        "inf": agree(RECORD, large=math.inf if rank == 0 else 9.0),
    }
    with pytest.raises(DesyncError, match="1 of 2 measured"):
        agree(RECORD, measured=rank == 0)
    errors = {}
    for name in ("step", "position", "global_batch_size"):
        mine = dataclasses.replace(RECORD, **{name: getattr(RECORD, name) + 2 * rank})
        with pytest.raises(DesyncError) as caught:
            agree(mine)
        errors[name] = str(caught.value)
    return outcomes, errors


@pytest.fixture(scope="module")
def results():
    return run_replicas(agree_in_many_ways, world_size=2)


def test_every_replica_learns_the_same(results):
    """The outcome of each reduction is equal on both, to the last bit."""
    first, second = (outcomes for outcomes, _ in results)
    assert first["plain"] == second["plain"]
    assert first["plain"].loss == 2.0
    assert first["plain"].grad_norm == 3.0
    assert first["plain"].finite
    assert not first["plain"].stop


def test_times_are_meant_and_energies_added_where_all_know_theirs(results):
    """The mean time of a step and the joules of all devices; where one replica has none, nobody has."""
    for outcomes, _ in results:
        assert (outcomes["plain"].step_s, outcomes["plain"].energy_j) == (pytest.approx(0.2), 3.0)
        assert outcomes["paused"].step_s is None
        assert math.isnan(outcomes["paused"].energy_j)


def test_one_replica_stops_all(results):
    """A flag that is raised on one is seen on both."""
    assert [outcomes["stop"].stop for outcomes, _ in results] == [True, True]


def test_what_one_replica_says_all_hear(results):
    """Saves that were asked for or failed, the mean busy time, and who is slow, with its number."""
    for outcomes, _ in results:
        reported, slow = outcomes["save"], outcomes["slow"]
        assert (reported.save, reported.failed_saves, reported.folder_removed) == (True, 2, False)
        assert (reported.busy_s, reported.slow_rank) == (1.5, None)
        assert slow.folder_removed
        assert (slow.slow_rank, slow.slowness) == (1, 1.5)


def test_the_replica_whose_gradient_is_not_finite_has_a_name(results):
    """Its own gradient is seen before the reduction; the combined one decides what is done."""
    for outcomes, _ in results:
        assert (outcomes["local"].bad_ranks, outcomes["local"].bad_rank, outcomes["local"].finite) == (1, 1, True)
        assert (outcomes["plain"].bad_ranks, outcomes["plain"].bad_rank) == (0, None)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_not_finite_on_one_is_known_to_all(results, value):
    """All of them count the step as dropped."""
    assert [outcomes[value].finite for outcomes, _ in results] == [False, False]


@pytest.mark.parametrize("name", ["step", "position", "global_batch_size"])
def test_replicas_at_different_places_are_found_out(results, name):
    """Both refuse, in a sentence with what is here and what is elsewhere."""
    here = [getattr(RECORD, name), getattr(RECORD, name) + 2]
    for (_, errors), value in zip(results, here, strict=True):
        assert f"{name} is {value} here, but {sum(here) / 2:g} on average over 2 replicas" in errors[name]


def test_one_process_agrees_with_itself():
    """Without a process group the same code gives the same kind of answer."""
    outcome = agree(RECORD, loss_sum=4.0)
    assert (outcome.loss, outcome.grad_norm, outcome.finite, outcome.stop) == (0.5, 3.0, True, False)


def test_the_record_counts_its_passes():
    """The last, ragged micro-batch is a pass too."""
    assert RECORD.end == 112
    assert [RECORD.micro_steps(world_size) for world_size in (1, 2, 3, 4)] == [4, 2, 2, 1]


def fail_on_rank_0(rank, world_size):
    def fail():
        assert rank == 0, "done on behalf of all"
        raise ConfigError("the folder is full")

    with pytest.raises(ConfigError if rank == 0 else AbortedError) as caught:
        on_rank_0(fail, rank=rank, device=torch.device("cpu"))
    found = on_rank_0(lambda: 5, rank=rank, device=torch.device("cpu"))
    return str(caught.value), found


def test_all_learn_that_rank_0_failed():
    """It raises its own error, the others another; what succeeds returns on rank 0 alone, and goes on everywhere."""
    first, second = run_replicas(fail_on_rank_0, world_size=2)
    assert first == ("the folder is full", 5)
    assert "rank 0" in second[0]
    assert second[1] is None


def wait_in_turns(rank, world_size):
    answers, beats = iter([False, False, True][2 * (rank == 1) :]), []
    waits = []

    def wait(timeout_s):
        waits.append(timeout_s)
        return next(answers, True)

    wait_together(wait, device=torch.device("cpu"), beat=lambda: beats.append(len(waits)))
    return waits, beats


def test_replicas_wait_for_one_another_in_turns():
    """One that is done asks the other again and again, so that no single collective lasts as long as a long write."""
    for waits, beats in run_replicas(wait_in_turns, world_size=2):
        assert beats == [1, 2, 3]
        assert all(0 < timeout_s < collective_timeout_s() for timeout_s in waits)


def test_a_collective_that_timed_out_names_the_setting(monkeypatch):
    """With its value; one that broke off does not."""
    monkeypatch.setenv("DPTRAIN_COLLECTIVE_TIMEOUT_S", "7")
    for text, is_named in (
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 7000ms for recv operation", True),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 7000 milliseconds", True),
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:3", False),
    ):
        with pytest.raises(PeerLostError) as caught, translate_peer_errors(lambda: 3):
            raise RuntimeError(text)
        assert ("DPTRAIN_COLLECTIVE_TIMEOUT_S, now 7," in str(caught.value)) is is_named
