"""The limits: each wrapper alone, then what the whole stack guarantees over random paths of the noise scale."""

import json
import math
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dptrain.control import (
    BatchSizeGrid,
    Bounds,
    Constant,
    DeadBand,
    Decision,
    DwellTime,
    Limits,
    MaxChange,
    Measurement,
    NoiseLaw,
    Probe,
    Rounding,
    ShrinkBand,
    limited,
    state_to_json,
)
from dptrain.control.base import Law
from dptrain.errors import CheckpointError, ConfigError
from dptrain.noise import SmoothedMoments, noise_scale


def measured(batch, *, lower=0.0, samples_seen=0, num_steps=0):
    phi = SimpleNamespace(
        bounds=lambda _z: (lower, math.inf), contrast=lambda phi: 2.0 * (phi < lower), num_steps=num_steps
    )
    return Measurement(samples_seen=samples_seen, global_batch_size=batch, noise_scale=phi)


def decided(controller, batch):
    _, decision = controller.update(controller.init(), measured(batch))
    return decision


@given(st.floats(1e-3, 1e9), st.integers(1, 10**4), st.booleans())
def test_ladder(batch, quantum, powers_of_two):
    """Below, above and nearest are rungs round the batch, and no rung is nearer in log space than the nearest."""
    grid = BatchSizeGrid(quantum=quantum, powers_of_two=powers_of_two)
    below, above, nearest = grid.below(batch), grid.above(batch), grid.nearest(batch)
    for grid_point in (below, above, nearest):
        assert grid_point % quantum == 0
        assert not powers_of_two or (grid_point // quantum).bit_count() == 1
    assert below <= max(batch, quantum)
    assert above >= batch
    assert nearest in (below, above)
    for grid_point in (below, above):
        assert abs(math.log(nearest / batch)) <= abs(math.log(grid_point / batch)) + 1e-12


def test_ladder_rungs_are_fixed():
    """A rung is its own neighbour in every direction, and the middle between two is the geometric one."""
    grid = BatchSizeGrid(quantum=6)
    assert all(f(24) == 24 for f in (grid.below, grid.above, grid.nearest))
    assert (grid.nearest(16.9), grid.nearest(17.1)) == (12, 24)
    assert BatchSizeGrid(quantum=5, powers_of_two=False).nearest(17.4) == 20


@pytest.mark.parametrize(
    ("wrap", "present", "asked", "stands"),
    [
        (lambda law: Bounds(law, smallest=16, largest=64), 32, 100, 64),
        (lambda law: Bounds(law, smallest=16, largest=64), 32, 5, 16),
        (lambda law: Rounding(law, grid=BatchSizeGrid(quantum=8)), 32, 100, 128),
        (lambda law: DeadBand(law, ratio=1.5), 32, 47, 32),
        (lambda law: DeadBand(law, ratio=1.5), 32, 22, 32),
        (lambda law: ShrinkBand(law, ratio=2.5), 32, 13, 32),
        (MaxChange, 32, 100, 64),
        (MaxChange, 32, 8, 16),
        (MaxChange, 128, 2, 16),
        (lambda law: MaxChange(law, factor=3, grid=BatchSizeGrid(quantum=8)), 32, 1000, 64),
        (lambda law: MaxChange(law, factor=3, grid=BatchSizeGrid(quantum=4)), 192, 3, 32),
    ],
)
def test_a_wrapper_overrules_and_says_why(wrap, present, asked, stands):
    """Each wrapper changes what breaks its limit, and adds why to the reason of the law."""
    decision = decided(wrap(Constant(asked)), present)
    assert decision.global_batch_size == stands
    assert decision.reason.startswith(f"constant batch of {asked}; ")
    assert decision.reason.endswith(f": {stands}")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda law: Bounds(law, smallest=16, largest=64),
        lambda law: Rounding(law, grid=BatchSizeGrid(quantum=8)),
        lambda law: DeadBand(law, ratio=1.5),
        lambda law: ShrinkBand(law, ratio=2.5),
        MaxChange,
        lambda law: DwellTime(law, decisions=1),
    ],
)
def test_a_wrapper_that_agrees_is_silent(wrap):
    """What is within the limit passes with the law's own reason."""
    decision = decided(wrap(Constant(64)), 32)
    assert (decision.global_batch_size, decision.reason) == (64, "constant batch of 64")


@pytest.mark.parametrize(("limit", "changes"), [({"decisions": 3}, [2, 5]), ({"samples": 35}, [4])])
def test_dwell(limit, changes):
    """As many decisions, or samples, pass from the start to the first change and from each change to the next."""
    controller, batch, changed = DwellTime(NoiseLaw(), **limit), 1, []
    state = controller.init()
    for i in range(8):
        measurement = measured(batch, lower=2.0 * batch, samples_seen=10 * i)
        state, decision = controller.update(state, measurement)
        if decision.global_batch_size != batch:
            changed.append(i)
        batch = int(decision.global_batch_size)
    assert changed == changes


def test_dwell_counts_changes_that_happened():
    """A change that the law asked for but nobody made starts no dwell time; one that others made does."""
    controller = DwellTime(Constant(64), decisions=2)
    state, _ = controller.update(controller.init(), measured(32))
    state, wanted = controller.update(state, measured(32))
    state, again = controller.update(state, measured(32))
    assert wanted.global_batch_size == again.global_batch_size == 64
    _, held = controller.update(state, measured(48))
    assert held.global_batch_size == 48


@pytest.mark.parametrize(
    ("present", "decisions"),
    [(1, 3), (8, 3), (16, 4), (256, 4), (17, 4), (31, 7), (32, 7), (128, 7), (129, 7), (4096, 2)],
)
def test_the_further_a_batch_is_off_the_less_it_waits(present, decisions):
    """Up to a factor of two all decisions are waited for, beyond fewer: a third for growth, two to shrink at least."""
    controller = DwellTime(Constant(64), decisions=7)
    state, batches = controller.init(), []
    for _ in range(8):
        state, decision = controller.update(state, measured(present))
        batches.append(decision.global_batch_size)
    assert batches == [present] * (decisions - 1) + [64] * (9 - decisions)


def test_a_run_may_begin_with_growth_alone():
    """In its first samples a smaller batch has to wait, with the reason said; a larger one never does."""
    controller = limited(Constant(64), quantum=1, limits=Limits(largest=512, grow_only_samples=100))
    for samples_seen, present, expected in [(0, 128, 128), (99, 128, 128), (100, 128, 64), (0, 32, 64)]:
        _, decision = controller.update(controller.init(), measured(present, samples_seen=samples_seen))
        assert decision.global_batch_size == expected
        assert ("first 100 samples" in decision.reason) == (present == expected)


@dataclass(frozen=True)
class ByBatch(Law):
    """Asks for what is written down for the batch in force; is content with one of which nothing is."""

    asked: dict = field(default_factory=dict)

    def decide(self, measurement):
        present = measurement.global_batch_size
        return Decision(global_batch_size=self.asked.get(present, present), reason="as written")


def stays(controller, batch, *, decisions, before=0):
    """Return [(batch, decisions for which it stays)] of a run that obeys, and that had measured `before` steps."""
    state, batches = controller.init(), []
    for step in range(decisions):
        batches.append(batch)
        state, decision = controller.update(state, measured(batch, num_steps=before + step))
        batch = decision.global_batch_size
    return [(batch, len(list(group))) for batch, group in groupby(batches)]


def test_a_probe_in_vain_is_repeated_ever_more_seldom():
    """The double is held for its time whatever the law says, and each pause is three times the last."""
    controller = Probe(ByBatch({32: 16}), steps=29, largest=256)
    expected = [(16, 117), (32, 30), (16, 349), (32, 84), (16, 1045), (32, 1)]
    assert stays(controller, 16, decisions=1626) == expected


def test_a_probe_that_finds_the_law_content_is_kept():
    """What a probe has found stays, and the next one begins after the same pause, from there."""
    controller = Probe(ByBatch({64: 32}), steps=5, largest=256)
    assert stays(controller, 16, decisions=111) == [(16, 21), (32, 21), (64, 8), (32, 61)]
    assert stays(Probe(ByBatch({32: 64}), steps=5, largest=64), 16, decisions=99) == [(16, 21), (32, 1), (64, 77)]


def test_what_is_given_up_later_was_found_in_vain():
    """Otherwise a law that is content with two batches for a while each would be taken to and fro for ever."""
    law = ByBatch({})
    controller = Probe(law, steps=5, largest=32)
    state, batch, asked = controller.init(), 16, []
    for step in range(200):
        law.asked.update({32: 16} if step == 100 else {})
        state, decision = controller.update(state, measured(batch, num_steps=step))
        batch = decision.global_batch_size
        asked.append(batch)
    # Found at the 20th decision, left at the 100th, and tried again 60 decisions after the first one back at 16.
    assert asked == [16] * 20 + [32] * 80 + [16] * 61 + [32] * 28 + [16] * 11


def test_a_probe_lasts_until_the_memory_is_of_the_double():
    """At least its steps, and a sixth of those that the run had measured when it began."""
    for before, length in [(0, 5), (9, 5), (15, 6), (579, 100)]:
        expected = [(16, 21), (32, length + 1), (16, 1)]
        assert (
            stays(Probe(ByBatch({32: 16}), steps=5, largest=256), 16, decisions=23 + length, before=before) == expected
        )


def test_no_probe_beyond_the_largest_batch_or_of_a_law_that_wants_another():
    """Nothing is tried that would not run; a law that is held back by others is not content."""
    assert stays(Probe(ByBatch(), steps=1, largest=31), 16, decisions=99) == [(16, 99)]
    controller = Probe(ByBatch({16: 12}), steps=1, largest=256)
    state = controller.init()
    for step in range(99):
        state, decision = controller.update(state, measured(16, num_steps=step))
        assert decision.global_batch_size == 12


def test_no_probe_of_the_double_of_a_batch_that_is_too_large():
    """What stays because it is too large by little is not doubled: the double would have to go back at once."""
    asked = {16: 16, 32: 16, 64: 64}
    for batch, largest in [(16, 32), (32, 32)]:
        controller = limited(
            ByBatch(asked), quantum=8, limits=Limits(largest=64, dead_band=1.6, shrink_band=2.25, probe_steps=5)
        )
        assert max(batch for batch, _ in stays(controller, batch, decisions=400)) == largest


@pytest.mark.parametrize(("asked", "stands"), [(15, 32), (14, 16), (32, 32), (33, 32), (52, 64)])
def test_the_way_down_is_longer_than_the_way_up(asked, stands):
    """A batch too large by less than the shrink band stays, one too small by more than the dead band grows."""
    controller = limited(Constant(asked), quantum=8, limits=Limits(largest=64, dead_band=1.6, shrink_band=2.25))
    assert decided(controller, 32).global_batch_size == stands


def test_no_probe_where_nothing_is_measured():
    """Steps that were not measured do not count: a probe would say nothing, and last for ever."""
    controller = Probe(ByBatch(), steps=1, largest=256)
    state = controller.init()
    for _ in range(99):
        state, decision = controller.update(state, measured(16, num_steps=7))
        assert decision.global_batch_size == 16


def test_a_probe_that_is_not_granted_is_asked_for_again():
    """While the run stays where it is the double is asked for; once it is elsewhere, that is over."""
    controller = Probe(ByBatch(), steps=2, largest=256)
    state, asked = controller.init(), []
    for step, batch in enumerate([16] * 10 + [24] * 10):
        state, decision = controller.update(state, measured(batch, num_steps=step))
        asked.append(decision.global_batch_size)
    assert asked == [16] * 8 + [32] * 2 + [24] * 8 + [48] * 2


def test_a_state_without_its_probes_is_refused():
    """A checkpoint of other settings is not half read."""
    controller = Probe(ByBatch(), steps=2, largest=256)
    with pytest.raises(CheckpointError, match="does not remember its probes"):
        controller.restore(state_to_json(DwellTime(ByBatch(), decisions=2).init()))


@pytest.mark.parametrize(
    ("quantum", "limits", "complaint"),
    [
        (8, {"largest": 7}, "largest must be at least 8"),
        (8, {"smallest": 33, "largest": 63}, "8, 16, 32"),
        (0, {"largest": 64}, "quantum"),
        (8, {"largest": 64, "max_change": 1.5}, "at least 2"),
        (8, {"largest": 64, "dead_band": 1.0}, "dead_band must be a ratio of batches above 1"),
        (8, {"largest": 64, "shrink_band": 1.0}, "shrink_band must be a ratio of batches above 1"),
        (8, {"largest": 64, "dwell_samples": -1}, "negative"),
        (8, {"largest": 64, "probe_steps": -1}, "probe_steps must be at least 1"),
    ],
)
def test_limits_out_of_range(quantum, limits, complaint):
    """Limits that no batch can meet are refused with the batches that run."""
    with pytest.raises(ConfigError, match=complaint):
        limited(Constant(8), quantum=quantum, limits=Limits(**limits))


# What follows holds for the whole stack, over paths of estimates that a run could throw at it.

anything = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]),
    st.floats(-1e100, 1e100),
    st.floats(1e-3, 1e6),
)
estimates = st.builds(
    SmoothedMoments,
    noise_trace=anything,
    grad_sq_norm=anything,
    var_trace=anything.map(abs),
    var_grad=anything.map(abs),
    cov=st.just(0.0),
    effective_steps=st.floats(1, 1e4),
    degrees_of_freedom=st.floats(1, 1e4),
    num_steps=st.just(10),
    num_samples=st.just(100.0),
)


def clean(phi):
    """An estimate of φ with ten per cent of error in both moments."""
    return SmoothedMoments(
        noise_trace=phi,
        grad_sq_norm=1.0,
        var_trace=(0.1 * phi) ** 2,
        var_grad=0.01,
        cov=0.0,
        effective_steps=100.0,
        degrees_of_freedom=100.0,
        num_steps=100,
        num_samples=1000.0,
    )


ramps = st.builds(
    lambda start, slope, n: [clean(start * math.exp(slope * i)) for i in range(n)],
    st.floats(1, 1e4),
    st.floats(-1, 1),
    st.integers(1, 15),
)
steps = st.builds(lambda phi, n: [clean(phi)] * n, st.floats(1, 1e6), st.integers(1, 10))
gaps = st.integers(1, 5).map(lambda n: [None] * n)
spikes = estimates.map(lambda estimate: [estimate])
paths = st.lists(st.one_of(ramps, steps, gaps, spikes), min_size=1, max_size=6).map(lambda parts: list(chain(*parts)))
quanta = st.integers(1, 48)
limit_settings = st.builds(
    Limits,
    largest=st.integers(48, 10**5),
    smallest=st.one_of(st.none(), st.integers(1, 100)),
    powers_of_two=st.booleans(),
    max_change=st.one_of(st.none(), st.floats(2, 10)),
    dead_band=st.one_of(st.none(), st.floats(1.1, 3)),
    shrink_band=st.one_of(st.none(), st.floats(1.1, 3)),
    dwell_samples=st.integers(0, 3000),
    dwell_decisions=st.integers(0, 4),
    probe_steps=st.integers(0, 3),
)


def stack(quantum, limits):
    """Return the stack with its lowest batch, or give the example up where no rung fits."""
    try:
        controller = limited(NoiseLaw(), quantum=quantum, limits=limits)
    except ConfigError:
        assume(False)
    return controller, controller.smallest


def walk(controller, batch, path, *, state=None, seen=0, num_steps=0):
    """Return [(samples seen, batch before, state before, decision)] along a path of estimates."""
    state, log = controller.init() if state is None else state, []
    for step, moments in enumerate(path, start=num_steps):
        phi = replace(noise_scale(moments), num_steps=step)
        measurement = Measurement(samples_seen=seen, global_batch_size=batch, noise_scale=phi)
        before = state
        state, decision = controller.update(state, measurement)
        log.append((seen, batch, before, decision))
        batch = decision.global_batch_size
        seen += 10 * batch
    return log


def changes(log):
    return [(i, seen) for i, (seen, batch, _, decision) in enumerate(log) if decision.global_batch_size != batch]


@settings(deadline=None)
@given(quantum=quanta, limits=limit_settings, path=paths)
def test_every_limit_holds_at_once(quantum, limits, path):
    """On any path: a whole number within the bounds, a rung, no larger change than allowed, no change too soon."""
    controller, start = stack(quantum, limits)
    log = walk(controller, start, path)
    for _, before, _, decision in log:
        batch = decision.global_batch_size
        assert isinstance(batch, int)
        assert max(limits.smallest or 0, quantum) <= batch <= limits.largest
        assert batch % quantum == 0
        assert not limits.powers_of_two or (batch // quantum).bit_count() == 1
        factor = limits.max_change or math.inf
        assert batch / before <= factor
        assert before / batch <= max(factor, math.sqrt(before))
        assert decision.reason
    moved = changes(log)
    for (i, seen), (j, later) in pairwise(moved):
        assert j - i >= -(-limits.dwell_decisions // 3)
        assert later - seen >= limits.dwell_samples


@settings(deadline=None)
@given(quantum=quanta, limits=limit_settings, moments=estimates, grid_point=st.integers(0, 30))
def test_no_limit_cycle(quantum, limits, moments, grid_point):
    """On an estimate that stays the same the batch goes one way, if anywhere, and turns back from probes alone.

    There are fewer and fewer of them. Probes at equal distances would make 40 turns in these 100 decisions.
    """
    for probe_steps, most_turns in [(0, 0), (limits.probe_steps, 8)]:
        controller, start = stack(quantum, replace(limits, probe_steps=probe_steps))
        grid = BatchSizeGrid(quantum=quantum, powers_of_two=limits.powers_of_two)
        log = walk(controller, grid.below(min(start << grid_point, controller.largest)), [moments] * 100)
        grows = [
            decision.global_batch_size > before
            for _, before, _, decision in log
            if before != decision.global_batch_size
        ]
        assert sum(one != other for one, other in pairwise(grows)) <= most_turns


@settings(deadline=None)
@given(quantum=quanta, limits=limit_settings, path=paths, data=st.data())
def test_replay_from_any_saved_state(quantum, limits, path, data):
    """A run resumed from the JSON of any of its states decides as the uninterrupted one did, reasons included."""
    controller, start = stack(quantum, limits)
    log = walk(controller, start, path)
    cut = data.draw(st.integers(0, len(path) - 1))
    seen, batch, state, _ = log[cut]
    restored = controller.restore(json.loads(json.dumps(state_to_json(state))))
    again = walk(controller, batch, path[cut:], state=restored, seen=seen, num_steps=cut)
    assert [decision for *_, decision in again] == [decision for *_, decision in log[cut:]]


@settings(deadline=None)
@given(quantum=quanta, limits=limit_settings, phi=st.floats(1, 1e5))
def test_shrinks_as_well_as_grows(quantum, limits, phi):
    """From the smallest batch up and from the largest down the stack comes near the same noise scale."""
    limits = replace(limits, dwell_samples=0, probe_steps=0)
    controller, start = stack(quantum, limits)
    up = walk(controller, start, [clean(phi)] * 200)[-1][3].global_batch_size
    down = walk(controller, controller.largest, [clean(phi)] * 200)[-1][3].global_batch_size
    target = min(max(phi, controller.smallest), controller.largest)
    # One rung beside the interval (a factor 1.5 at ten per cent of error), or the width of a dead band.
    slack = 1.5 * max(limits.dead_band or 1, limits.shrink_band or 1, 2)
    assert target / slack <= up <= down * 1.0001 <= target * slack


@pytest.mark.parametrize("present", [7, 24, 100, 10_000])
def test_a_batch_off_the_ladder_comes_onto_it(present):
    """From a batch that does not run here (a run resumed on other hardware) the next decision is one that does."""
    controller = limited(NoiseLaw(), quantum=8, limits=Limits(largest=64, dwell_decisions=10))
    assert decided(controller, present).global_batch_size in (8, 16, 32, 64)
