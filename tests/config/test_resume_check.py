"""Which settings a resumed run may have otherwise, and when it may be longer than it was."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from dptrain.config.resume_check import check_same_settings
from dptrain.config.train_config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
from dptrain.errors import ConfigError
from dptrain.models.settings import SparsityConfig


def test_a_run_is_resumed_with_its_own_settings_only():
    """Each setting that would make it another run is named with both values."""
    saved = asdict(TrainConfig(seed=3, task_options={"width": 4}))
    check_same_settings(TrainConfig(seed=3, task_options={"width": 4}), saved=saved)
    changed = TrainConfig(seed=4, task_options={"width": 5}, optimizer=OptimizerConfig(beta1=0.5))
    with pytest.raises(ConfigError) as caught:
        check_same_settings(changed, saved=saved)
    for text in ("seed was 3 and is 4", "task_options.width was 4 and is 5", "optimizer.beta1 was 0.9 and is 0.5"):
        assert text in str(caught.value)


def test_what_is_only_reported_may_change_on_the_way():
    """Log, checkpoints, workers and the folder's place do not make another run."""
    config = TrainConfig()
    other = replace(
        config,
        run_dir="elsewhere",
        num_workers=2,
        log=LogConfig(tracker="none", every_steps=5),
        checkpoint=CheckpointConfig(every_samples=5, keep=1),
    )
    check_same_settings(other, saved=asdict(config))


def test_a_setting_that_the_saved_run_did_not_know_had_its_default():
    """A checkpoint of an earlier version goes on, where what is new since is left at its default."""
    config = TrainConfig(max_samples=1000, task_options={"width": 3})
    saved = asdict(config)
    del saved["sparsity"], saved["model"]["new_head"]
    check_same_settings(config, saved=saved)
    with pytest.raises(ConfigError, match=r"sparsity.method was 'off' and is 'rigl'"):
        check_same_settings(replace(config, sparsity=SparsityConfig(method="rigl")), saved=saved)


def lengthened(schedule, *, old=1000, new=2000, position=1000, **optimizer):
    config = TrainConfig(max_samples=old, optimizer=OptimizerConfig(schedule=schedule, **optimizer))
    check_same_settings(replace(config, max_samples=new), saved=asdict(config), position=position)


def test_a_run_is_extended_where_the_schedule_allows_it():
    """A constant rate, or one that has not begun to decay, was the same at every earlier step."""
    lengthened("constant")
    lengthened("constant", old=1000, new=600, position=500)
    lengthened("wsd", position=800)
    lengthened("wsd", position=500, decay_fraction=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "cosine"}, "the cosine schedule so far was that of the old length.*--branch-from"),
        ({"schedule": "linear"}, "Leave max_samples out to finish the run"),
        ({"schedule": "cosine", "position": 0}, "max_samples was 1,000 and is 2,000"),
        ({"schedule": "wsd", "position": 801}, "the wsd schedule has begun to decay at 800 samples"),
        ({"schedule": "constant", "new": 999}, "has seen 1,000 samples already"),
    ],
)
def test_where_it_does_not_the_error_says_what_to_do(settings, words):
    """Another course of the rate would have led elsewhere."""
    with pytest.raises(ConfigError, match=words):
        lengthened(**settings)
