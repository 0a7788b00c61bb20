"""How far a run is: what a checkpoint holds of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptrain.train.progress import Progress


def test_a_changed_copy_is_what_replace_makes_and_leaves_the_original_alone() -> None:
    """A changed copy of the progress is what `dataclasses.replace` makes, and the original stays as it was."""
    before = Progress(global_batch_size=16, learning_rate_factor=1.0, eval_figures={"loss": 1.0})
    after = before.updated(step=3, position=48, loss_last=0.5)
    assert after == replace(before, step=3, position=48, loss_last=0.5)
    assert before.step == 0


def test_a_field_that_does_not_exist_is_refused() -> None:
    """A copy with a field that the record does not have is refused, and names it."""
    with pytest.raises(TypeError, match="no steps"):
        Progress(global_batch_size=16, learning_rate_factor=1.0).updated(steps=3)
