"""Where a run lies among the fixed batches that its own noise scale implies: cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptrain.explain.model.run_placement import position, resolved_share
from dptrain.explain.record import RunRecord, read_run
from tests.explain.made_runs import write_run


def run(phi, batches, *, every=1, spread=1.5):
    """A run of one row per `every` steps, with a noise scale and a batch for each step."""
    samples = np.cumsum(batches)
    rows = [
        {
            "step": step,
            "progress/samples": samples[step - 1],
            "batch/global": batches[step - 1],
            "noise_scale/state": "resolved",
            "noise_scale/value": phi[step - 1],
            "noise_scale/lower": phi[step - 1] / spread,
            "noise_scale/upper": phi[step - 1] * spread,
        }
        for step in range(every, len(phi) + 1, every)
    ]
    return RunRecord(name="run", train=rows, evals=[], decisions=[], summary={}, config={})


def following(ratio, *, ideal_steps=2000):
    """A run whose noise scale φ grows by a factor, exponentially over its progress, and whose batch is √(r·φ).

    r is the mean of φ: that is the middle of the curve, where steps and samples are saved in equal parts.
    """
    phi = 100 * ratio ** np.linspace(0, 1, ideal_steps)
    batch = np.sqrt(phi.mean() * phi)
    taken = 1 + phi / batch  # steps for each unit of progress
    steps = np.arange(0.5, taken.sum())
    at = np.searchsorted(np.cumsum(taken), steps)
    return run(phi[at], batch[at])


@settings(max_examples=30)
@given(st.lists(st.floats(1.0, 1e5), min_size=1, max_size=30), st.integers(1, 4096))
def test_a_fixed_batch_lies_on_its_own_curve(phi, batch):
    """Whatever the noise scale did, a run of one batch took what the curve says of that batch, and saved nothing."""
    found = position(run(phi, [batch] * len(phi)))
    for curve in (found.implied, found.low, found.high):
        assert curve.steps(batch) == pytest.approx(len(phi))
        assert curve.samples(batch) == pytest.approx(len(phi) * batch)
    assert found.saving is None
    assert found.batch == pytest.approx(batch)


def test_the_averaged_noise_scale_lies_within_those_of_the_run():
    """E_min/S_min is a mean of the noise scale, weighted by progress; of a constant one it is that one."""
    phi = np.geomspace(50, 500, 200)
    assert 50 < position(run(phi, [100] * 200)).implied.noise_scale < 500
    assert position(run([70.0] * 9, [8, 16, 32] * 3)).implied.noise_scale == pytest.approx(70)


@pytest.mark.parametrize(("ratio", "saving"), [(10, 0.0250), (100, 0.0785), (1000, 0.1313)])
def test_following_a_growing_noise_scale_saves_what_theory_says(ratio, saving):
    """A noise scale that grows exponentially by 10, 100, 1000 lets an adaptive batch save 2.5, 7.8, 13.1 % of both."""
    found = position(following(ratio))
    assert found.best_saving == pytest.approx(saving, rel=0.01)
    assert found.saving == pytest.approx(saving, rel=0.02)


def test_a_batch_that_moves_the_wrong_way_costs():
    """A batch that shrinks while the noise scale grows needs more of both than the fixed one."""
    phi = np.geomspace(50, 5000, 400)
    assert position(run(phi, np.geomspace(2000, 20, 400))).saving < -0.05


def test_steps_that_were_not_logged_count():
    """A log of every tenth step places the run where the log of every step does."""
    phi, batches = np.geomspace(50, 500, 400), np.repeat([32, 64, 128, 256], 100)
    every, tenth = (position(run(phi, batches, every=every)) for every in (1, 10))
    assert (tenth.steps, tenth.samples) == (every.steps, every.samples)
    assert tenth.implied.min_steps == pytest.approx(every.implied.min_steps, rel=0.02)
    assert tenth.implied.min_samples == pytest.approx(every.implied.min_samples, rel=0.02)


def test_the_ends_of_the_interval_give_the_ends_of_the_curve():
    """A smaller noise scale means fewer samples at least, and more steps."""
    found = position(run(np.geomspace(50, 500, 100), [100] * 100))
    assert found.low.min_samples < found.implied.min_samples < found.high.min_samples
    assert found.low.min_steps > found.implied.min_steps > found.high.min_steps


def test_a_beginning_is_placed_by_itself():
    """Up to a position in samples only what came before it counts."""
    record = run(np.geomspace(50, 500, 100), [100] * 100)
    found = position(record, up_to_samples=4000)
    assert (found.steps, found.samples) == (40, 4000)
    assert position(record, up_to_samples=1).steps == 1


def test_no_place_without_a_noise_scale(tmp_path):
    """What was resolved for less than half of the samples, or never, does not place a run."""
    assert position(read_run(write_run(tmp_path / "a", noise="never"))) is None
    late = read_run(
        write_run(tmp_path / "b", edit=lambda rows: [row.update({"noise_scale/upper": None}) for row in rows[:250]])
    )
    assert 0 < resolved_share(late) < 0.5
    assert position(late) is None
