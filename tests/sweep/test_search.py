"""The search: finds the best rate wherever it is, and asks for the same runs whatever was done first."""

from __future__ import annotations

import math
import random

import pytest

from dptrain.sweep import Course, SweepSpec, samples_left, search, table

EVERY = 50


class World:
    """Runs on paper. Their loss falls exponentially, fastest at the rate 0.02·√batch, and not at all far above it."""

    def __init__(self, *, scatter=0.0, floor=0.0, best=0.02, diverges_beyond=math.inf):
        self.scatter, self.floor, self.best, self.diverges_beyond = scatter, floor, best, diverges_beyond
        self.trained = {}

    def samples_per_nat(self, run):
        off = math.log2(run.learning_rate / (self.best * math.sqrt(run.global_batch_size)))
        luck = math.exp(self.scatter * random.Random(repr(run)).gauss(0, 1))
        return 400 * (1 + run.global_batch_size / 64) * 1.3 ** (off * off) * luck

    def course(self, run, *, up_to):
        rate = self.samples_per_nat(run)
        every = max(EVERY, run.global_batch_size)
        if run.learning_rate > self.diverges_beyond:
            return Course(positions=[every], losses=[3.0], is_over=up_to > 0, has_diverged=up_to > 0)
        end = min(up_to, self.spec.max_samples(run.global_batch_size))
        positions = range(every, int(end) + 1, every)
        losses = [self.floor + math.exp(-position / rate) for position in positions]
        is_over = up_to >= self.spec.max_samples(run.global_batch_size)
        return Course(positions=positions, losses=losses, is_over=is_over)

    def course_of(self, run):
        return self.trained.get(run, Course())

    def run(self, spec, *, order=None):
        """Train whatever is asked for; with an order, in random pieces, several at a time and for longer than asked."""
        self.spec, self.trained = spec, {}
        while True:
            searches = [search(spec, batch, self.course_of) for batch in spec.batch_sizes]
            unsettled = [run for found in searches for run in found.unsettled]
            if not unsettled:
                return searches
            if order is None:
                for run in unsettled:
                    self.trained[run] = self.course(run, up_to=math.inf)
                continue
            for run in order.sample(unsettled, k=min(len(unsettled), 3)):
                position = max(self.course_of(run).positions, default=0)
                self.trained[run] = self.course(run, up_to=position + order.choice([1, 2, 5, 40]) * 512)

    def rows(self, searches):
        return list(table(self.spec, searches, course_of=self.course_of, clock_of=lambda _: ([], [])))


def spec(**changes):
    given = {
        "batch_sizes": [4, 64],
        "targets": [0.3, 0.1],
        "seeds": [0],
        "learning_rates": None,
        "base_batch_size": 16,
        "base_learning_rate": 0.08,
        "base_samples": 20_000,
        "exponent": 0.5,
    }
    return SweepSpec(**{**given, **changes})


@pytest.mark.parametrize("guess", [0.08, 0.01, 0.6])
def test_the_best_rate_is_found_from_any_guess(guess):
    """The grid widens until the best one has a neighbour on both sides that is worse."""
    world = World()
    for found in world.run(spec(base_learning_rate=guess)):
        batch = found.runs[0].global_batch_size
        needed = {run.grid_point: world.course_of(run).reached(0.1) or math.inf for run in found.runs}
        for choice in found.choices:
            rate = world.spec.run(batch, grid_point=choice.grid_point, seed=0).learning_rate
            assert abs(math.log2(rate / (0.02 * math.sqrt(batch)))) <= 0.5 + 1e-3
            assert needed[choice.grid_point] <= min(needed[choice.grid_point - 1], needed[choice.grid_point + 1])
            assert not choice.is_at_edge


def test_a_rate_that_diverges_is_worse_than_any():
    """The search turns round below it."""
    for found in World(diverges_beyond=0.1).run(spec(base_learning_rate=0.6, batch_sizes=[16, 64])):
        assert max(run.learning_rate for run in found.runs) > 0.1
        assert all(choice.grid_point is not None for choice in found.choices)
        chosen = {run.grid_point: run.learning_rate for run in found.runs}
        assert max(chosen[choice.grid_point] for choice in found.choices) <= 0.1


def test_targets_may_choose_differently():
    """Each has the rate that is fastest for it; the runs are those that any of them needs."""
    world = World(floor=0.05)
    world.samples_per_nat = lambda run: 400 / run.learning_rate
    world.course = _with_floor_by_rate(world)
    (found,) = world.run(spec(batch_sizes=[16], targets=[0.5, 0.12]))
    easy, hard = found.choices
    assert easy.grid_point > hard.grid_point


def _with_floor_by_rate(world):
    """A higher rate falls faster, and not as low."""

    def course(run, *, up_to):
        end = min(up_to, world.spec.max_samples(16))
        positions = range(EVERY, int(end) + 1, EVERY)
        losses = [run.learning_rate / 2 + math.exp(-position * run.learning_rate / 40) for position in positions]
        return Course(positions=positions, losses=losses, is_over=up_to >= world.spec.max_samples(16))

    return course


def test_the_other_seeds_run_where_the_first_does_not_tell():
    """At the best rate, and at each that is within a tenth of it; not at the others."""
    world = World(scatter=0.02)
    searches = world.run(spec(seeds=[0, 1, 2]))
    for found in searches:
        by_grid_point = {}
        for run in found.runs:
            by_grid_point.setdefault(run.grid_point, set()).add(run.seed)
        assert set(map(len, by_grid_point.values())) == {1, 3}
        assert all(by_grid_point[choice.grid_point] == {0, 1, 2} for choice in found.choices)


def test_a_rate_that_fails_a_seed_is_not_chosen():
    """The next best one is tried on all seeds instead."""
    world = World()
    plain = world.course

    def course(run, *, up_to):
        failing = run.seed == 1 and run.grid_point == 0
        found = plain(run, up_to=up_to)
        return Course(positions=[EVERY], losses=[3.0], is_over=True, has_diverged=True) if failing else found

    world.course = course
    (found,) = world.run(spec(batch_sizes=[16], seeds=[0, 1]))
    assert {choice.grid_point for choice in found.choices} <= {-1, 1}
    assert {run.seed for run in found.runs if run.grid_point == found.choices[0].grid_point} == {0, 1}


def test_a_target_out_of_reach_ends_the_search():
    """No rate is chosen for it, the others are found all the same, and no run goes on for ever."""
    world = World(floor=0.2)
    for found in world.run(spec(targets=[0.5, 0.1])):
        assert found.cap == math.inf
        assert found.choices[0].grid_point is not None
        assert found.choices[1].grid_point is None
        assert len(found.runs) < 8


def test_listed_rates_are_all_tried_and_no_other():
    """The best of them being the last one is reported."""
    (found,) = World().run(spec(batch_sizes=[16], learning_rates=[0.01, 0.02, 0.04]))
    assert [run.learning_rate for run in found.runs] == [0.01, 0.02, 0.04]
    assert [(choice.grid_point, choice.is_at_edge) for choice in found.choices] == [(2, True), (2, True)]
    (found,) = World().run(spec(batch_sizes=[16], learning_rates=[0.02, 0.08, 0.3]))
    assert [(choice.grid_point, choice.is_at_edge) for choice in found.choices] == [(1, False), (1, False)]


@pytest.mark.parametrize("number", range(12))
def test_the_table_does_not_depend_on_what_was_done_first(number):
    """Several runs at a time, in pieces, in any order, for longer than needed: the rows are those of one by one."""
    world = World(scatter=0.2, best=0.005, diverges_beyond=0.3)
    asked = spec(seeds=[0, 1, 2], batch_sizes=[4, 32, 256], base_samples=8000)
    expected = world.rows(world.run(asked))
    in_pieces = world.rows(world.run(asked, order=random.Random(number)))
    assert in_pieces == expected
    assert {row.status for row in expected} >= {"done", "hopeless"}


def test_a_hopeless_run_is_settled_before_its_end():
    """Once another run of its batch has reached all targets in a third of the samples."""
    world = World()
    asked = spec(batch_sizes=[16])
    world.spec = asked
    best, slow = (asked.run(16, grid_point=grid_point, seed=0) for grid_point in (0, 1))
    world.trained = {best: world.course(best, up_to=math.inf), slow: Course(positions=[EVERY], losses=[1.0])}
    cap = search(asked, 16, world.course_of).cap
    assert cap == pytest.approx(3 * world.course_of(best).reached(0.1))
    assert slow in search(asked, 16, world.course_of).unsettled
    world.trained[slow] = Course(positions=[cap - 1, cap + 1], losses=[1.0, 1.0])
    assert slow not in search(asked, 16, world.course_of).unsettled


def test_what_is_added_later_asks_for_what_is_missing_alone():
    """A further batch, a further target or a further seed leaves runs that are done as they are."""
    world = World(scatter=0.02)
    searches = world.run(spec())
    done = {run for found in searches for run in found.runs}
    for changes in ({"batch_sizes": [4, 16, 64]}, {"seeds": [0, 1]}, {"targets": [0.3, 0.2, 0.1]}):
        world.spec = spec(**changes)
        asked = [search(world.spec, batch, world.course_of) for batch in world.spec.batch_sizes]
        assert done <= {run for found in asked for run in found.runs} or changes.keys() == {"seeds"}
        assert not {run for found in asked for run in found.unsettled} & done


def test_what_is_left_shrinks_as_runs_come_on():
    """From the longest that all could take, over an estimate by those that are done, to nothing."""
    world, asked = World(), spec(seeds=[0, 1])
    world.spec = asked
    nothing = [search(asked, batch, world.course_of) for batch in asked.batch_sizes]
    before = samples_left(asked, nothing, world.course_of)
    assert before == 3 * (20_000 + 80_000) + 20_000 + 80_000
    run = nothing[0].runs[1]
    world.trained[run] = world.course(run, up_to=math.inf)
    some = [search(asked, batch, world.course_of) for batch in asked.batch_sizes]
    assert 0 < samples_left(asked, some, world.course_of) < before
    assert samples_left(asked, world.run(asked), world.course_of) == 0
