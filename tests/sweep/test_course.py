"""When a run is at a target: between two evaluations, not for a lucky dip, and the same however its log is read."""

from __future__ import annotations

import json
import math

import pytest

from dptrain.errors import ConfigError
from dptrain.sweep import Course, CourseLog, read_clock, read_course

FALLING = Course(positions=[10, 20, 30, 40, 50], losses=[1.0, 0.5, 0.25, 0.125, 0.0625])


def test_between_evaluations_the_logarithm_falls_linearly():
    """An exponential loss is found where it is."""
    for target in (0.9, 0.5, 0.3, 0.2):
        assert FALLING.reached(target) == pytest.approx(10 - 10 * math.log2(target))


def test_losses_that_are_not_positive_fall_linearly_themselves():
    """A logarithm would have nothing to say of them."""
    course = Course(positions=[10, 20, 30, 40], losses=[1.0, -1.0, -3.0, -5.0])
    assert course.reached(-2.0) == pytest.approx(25)


def test_the_last_evaluation_does_not_count():
    """It has no neighbour yet that would make sure of it."""
    assert FALLING.reached(0.0625) is None
    assert FALLING.reached(0.125) == 40


def test_a_lucky_dip_is_no_crossing():
    """One evaluation far below its neighbours changes nothing; two do."""
    dip = Course(positions=range(10, 80, 10), losses=[1.0, 0.9, 0.1, 0.8, 0.7, 0.6, 0.5])
    assert dip.reached(0.2) is None
    assert dip.reached(0.75) == pytest.approx(dip.reached(0.75, up_to=60))
    assert Course(positions=range(10, 60, 10), losses=[1.0, 0.9, 0.1, 0.1, 0.7]).reached(0.2) is not None
    assert Course(positions=[10, 20, 30], losses=[0.1, 0.9, 0.8]).reached(0.2) is None


def test_what_comes_after_the_cap_does_not_count():
    """Nor does a crossing whose confirmation comes after it: so it does not matter when the run was stopped."""
    assert FALLING.reached(0.25, up_to=40) == 30
    assert FALLING.reached(0.25, up_to=39) is None
    for stopped_after in range(3, 6):
        course = Course(positions=FALLING.positions[:stopped_after], losses=FALLING.losses[:stopped_after])
        assert course.reached(0.5, up_to=30) == 20


def test_a_target_that_was_there_before_the_first_look_is_early():
    """It is reached, but nobody knows when."""
    assert FALLING.is_early(1.5)
    assert FALLING.reached(1.5) == 10
    assert not FALLING.is_early(0.9)
    assert not Course().is_early(1.0)


def test_a_loss_that_is_no_number_is_above_every_target():
    """After it a crossing is where the loss is one again."""
    course = Course(positions=[10, 20, 30, 40], losses=[math.inf, math.inf, 0.1, 0.1])
    assert course.reached(0.5) == 30
    assert Course(positions=[10, 20], losses=[math.inf] * 2).lowest() == math.inf


def test_the_lowest_loss_is_one_that_was_confirmed():
    """It ranks runs that reach no target, whose end is not yet known."""
    assert FALLING.lowest() == 0.125
    assert FALLING.lowest(up_to=30) == 0.5
    assert Course().lowest() == math.inf


# Reading


def row(kind, step, **more):
    return json.dumps({"kind": kind, "step": step, "progress/samples": 8 * step, **more}) + "\n"


def steps(first, last, loss=1.0):
    return "".join(
        row("train", step, **{"train/loss": loss, "progress/wall_s": step / 4}) for step in range(first, last)
    )


def evaluation(step, loss):
    return row("eval", step, **{"eval/loss": loss})


def test_a_log_is_read_as_it_grows(tmp_path):
    """Piece by piece, torn anywhere, it gives what reading it whole gives."""
    text = steps(1, 5) + evaluation(4, 0.9) + steps(5, 9) + evaluation(8, None) + steps(9, 12) + evaluation(11, 0.5)
    path = tmp_path / "metrics.jsonl"
    log = CourseLog(tmp_path, max_skipped_steps=3)
    assert log.read() == Course(positions=[], losses=[])
    for begin in range(0, len(text), 97):
        with path.open("a") as file:
            file.write(text[begin : begin + 97])
        log.read()
    expected = Course(positions=[32, 64, 88], losses=[0.9, math.inf, 0.5])
    assert log.read() == read_course(tmp_path, max_skipped_steps=3) == expected


def test_a_log_that_was_cut_is_read_anew(tmp_path):
    """A run that goes on from a checkpoint tells again what came after it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(steps(1, 9) + evaluation(4, 0.9) + evaluation(8, 0.8))
    log = CourseLog(tmp_path, max_skipped_steps=3)
    assert log.read().positions == [32, 64]
    (tmp_path / "new").write_text(steps(1, 5) + evaluation(4, 0.9))
    (tmp_path / "new").replace(path)
    assert log.read().positions == [32]
    with path.open("a") as file:
        file.write(steps(5, 9) + evaluation(8, 0.7))
    assert log.read().losses == [0.9, 0.7]


def test_a_log_that_was_cut_and_is_longer_already_is_read_anew(tmp_path):
    """A file in its place may have its number, and as many bytes: what was read last tells."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(steps(1, 9) + evaluation(8, 0.8))
    log = CourseLog(tmp_path, max_skipped_steps=3)
    assert log.read().losses == [0.8]
    path.write_text(steps(1, 5) + evaluation(4, 0.95) + steps(5, 20) + evaluation(16, 0.75))
    assert log.read() == read_course(tmp_path, max_skipped_steps=3)
    assert log.read().losses == [0.95, 0.75]


@pytest.mark.parametrize(("num_skipped", "diverged"), [(2, False), (3, True), (4, True)])
def test_a_run_that_only_skipped_at_its_end_has_diverged(tmp_path, num_skipped, diverged):
    """As many skipped steps as end a run are its end."""
    (tmp_path / "metrics.jsonl").write_text(steps(1, 10) + steps(10, 10 + num_skipped, loss=None) + evaluation(9, 1.0))
    course = read_course(tmp_path, max_skipped_steps=3)
    assert (course.is_over, course.has_diverged) == (diverged, diverged)


def test_skipped_steps_that_are_not_neighbours_prove_nothing(tmp_path):
    """A log that leaves steps out does not tell what was between them."""
    (tmp_path / "metrics.jsonl").write_text("".join(steps(step, step + 1, loss=None) for step in (10, 20, 30)))
    assert not read_course(tmp_path, max_skipped_steps=3).is_over


def test_a_summary_is_the_end(tmp_path):
    """It is written when the run is at its length."""
    (tmp_path / "metrics.jsonl").write_text(steps(1, 5))
    (tmp_path / "summary.json").write_text("{}")
    course = read_course(tmp_path, max_skipped_steps=3)
    assert course.is_over
    assert not course.has_diverged


def test_a_damaged_row_is_reported(tmp_path):
    """With the file, and what to do about it."""
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "st\n')
    with pytest.raises(ConfigError, match="remove the folder"):
        read_course(tmp_path, max_skipped_steps=3)


def test_the_clock_of_a_run(tmp_path):
    """Samples and seconds of its steps, without its evaluations."""
    (tmp_path / "metrics.jsonl").write_text(steps(1, 4) + evaluation(3, 0.5))
    samples, seconds = read_clock(tmp_path)
    assert samples.tolist() == [8, 16, 24]
    assert seconds.tolist() == [0.25, 0.5, 0.75]
