"""Runs side by side: what each needed to the loss that all reached, on runs whose answer is plain."""

from __future__ import annotations

import numpy as np
import pytest

from dptrain.explain import compare
from dptrain.explain.record import RunRecord, read_run
from tests.explain.made_runs import write_run


def run(losses, *, size=10, evals=(), task="digits", clock=True):
    """A run of one row per step, each of `size` samples and a second, with evaluations as (samples, loss)."""
    rows = [
        {
            "step": step,
            "progress/samples": size * step,
            "progress/wall_s": float(step) if clock else None,
            "batch/global": size,
            "train/loss": loss,
        }
        for step, loss in enumerate(losses, start=1)
    ]
    held_out = [{"progress/samples": samples, "eval/loss": loss} for samples, loss in evals]
    return RunRecord(name="run", train=rows, evals=held_out, decisions=[], summary={}, config={"task": task})


def test_the_target_is_the_lowest_loss_that_all_reached():
    """Of two runs it is the worse one's best; one that never had a finite loss leaves none."""
    assert compare.common_target([run([3.0, 1.0, 2.0]), run([3.0, 2.0, 1.5])]).loss == 1.5
    assert compare.common_target([run([3.0, 1.0]), run([None, None])]) is None


def test_held_out_losses_go_before_training_losses():
    """Where every run was evaluated, that is what is compared; else nobody's evaluation is."""
    evaluated = run([3.0, 1.0], evals=[(10, 2.5), (20, 2.0)])
    assert compare.common_target([evaluated, evaluated]) == compare.Target(loss=2.0, held_out=True)
    assert not compare.common_target([evaluated, run([3.0, 1.0])]).held_out


def test_losses_of_two_tasks_are_not_compared():
    """They have nothing in common but the name."""
    runs = [run([3.0, 1.0]), run([3.0, 1.0], task="pysource")]
    assert compare.common_target(runs) is None
    assert "no loss in common" in compare.about_efforts(runs, None)


def test_the_effort_is_found_between_two_evaluations():
    """Half-way down the line between two evaluations lies half-way between them in samples, steps and seconds."""
    found = compare.effort(
        run([1.0] * 10, evals=[(20, 3.0), (60, 1.0), (100, 2.0)]), compare.Target(loss=2.0, held_out=True)
    )
    assert (found.samples, found.steps, found.wall_s) == (40, 4, 4)


def test_a_run_that_began_below_the_target_needed_its_first_evaluation():
    """What came before the first figure is not known."""
    found = compare.effort(run([1.0] * 10, evals=[(20, 1.0), (60, 0.5)]), compare.Target(loss=2.0, held_out=True))
    assert found.samples == 20


def test_every_run_reaches_the_common_target():
    """Whatever the losses, the effort to the common target lies within each run."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        runs = [run(rng.standard_normal(30).tolist(), size=int(rng.integers(1, 9))) for _ in range(3)]
        target = compare.common_target(runs)
        for each in runs:
            assert each.train[0]["progress/samples"] <= compare.effort(each, target).samples
            assert compare.effort(each, target).samples <= each.train[-1]["progress/samples"]


def test_sentences_name_each_run_by_its_letter(tmp_path):
    """A, B and so on, in the order in which they were given; many runs are cut off."""
    runs = [run([3.0, 1.0]), run([3.0, 2.0], clock=False)]
    target = compare.common_target(runs)
    assert compare.about_losses(runs) == "Lowest smoothed training loss: A 1; B 2"
    assert compare.about_seconds(runs, target).startswith("To a smoothed training loss of 2: A 1.5 s; B not timed")
    assert compare.about_efforts(runs, target).endswith("A 2 steps, 15 samples; B 2 steps, 20 samples")
    assert compare.about_batches([*runs, read_run(write_run(tmp_path))]).endswith("B 10 throughout; C 16 to 128")
    assert compare.about_noise_scales(runs) == "Noise scale at the end, in samples: A not resolved; B not resolved"
    assert compare.about_losses(runs * 4).endswith("E 1; …")


@pytest.mark.parametrize(("samples", "step"), [(0, 1), (10, 1), (19, 1), (20, 2), (999, 3)])
def test_the_row_at_a_position_is_the_last_one_up_to_it(samples, step):
    """Before the first row it is the first."""
    assert compare.row_at(run([1.0] * 3), samples=samples)["step"] == step
