"""Settings given in tokens, and what they are in samples."""

from __future__ import annotations

import ast
import inspect
import re
from itertools import pairwise

import pytest

from dptrain.checkpoint.settings import CheckpointConfig
from dptrain.config.filled_in import filled_in
from dptrain.config.tokens import in_samples
from dptrain.config.train_config import LogConfig, OptimizerConfig, TrainConfig
from dptrain.control.settings import ControlConfig
from dptrain.errors import ConfigError
from dptrain.tasks import Suggestion


def test_each_setting_in_tokens_becomes_its_counterpart_in_samples():
    """Lengths, batches, bounds, warm-up and intervals are divided by the tokens of a sample, and rounded."""
    given = TrainConfig(
        max_tokens=10**6,
        global_batch_tokens=65536,
        control=ControlConfig(smallest_tokens=32768, largest_tokens=131072),
        optimizer=OptimizerConfig(reference_batch_tokens=65536, warmup_tokens=0),
        checkpoint=CheckpointConfig(every_tokens=1),
        log=LogConfig(eval_every_tokens=100_000),
    )
    found = in_samples(given, tokens_per_sample=1024, task="gpt")
    assert (found.max_samples, found.global_batch_size) == (977, 64)
    assert (found.control.smallest, found.control.largest) == (32, 128)
    assert (found.optimizer.reference_batch_size, found.optimizer.warmup_samples) == (64, 0)
    assert (found.checkpoint.every_samples, found.log.eval_every_samples) == (1, 98)
    assert found.max_tokens is found.global_batch_tokens is found.control.smallest_tokens is None
    assert in_samples(found, tokens_per_sample=1024, task="gpt") == found


def test_a_schedule_of_batches_in_tokens():
    """Positions, batches and ramps are all in tokens."""
    control = ControlConfig(law="schedule", schedule_tokens="0:65536 1M:65536..131072 2M:131072")
    found = in_samples(TrainConfig(control=control), tokens_per_sample=1024, task="gpt").control
    assert found.schedule == "0:64 977:64..128 1953:128"
    assert found.schedule_tokens is None


def test_the_schedules_that_the_help_shows_are_read():
    """Each quoted text of the help of control.schedule and control.schedule_tokens is a value of that setting."""
    tree = ast.parse(inspect.getsource(ControlConfig)).body[0].body
    shown = 0
    for field, described in pairwise(tree):
        if isinstance(field, ast.AnnAssign) and field.target.id in ("schedule", "schedule_tokens"):
            for text in re.findall(r'"([^"]+)"', described.value.value):
                TrainConfig(control=ControlConfig(law="schedule", **{field.target.id: text}))
                shown += 1
    assert shown == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(max_tokens=10, max_samples=1), "max_tokens=10 and max_samples=1 are the same setting"),
        (
            lambda: TrainConfig(optimizer=OptimizerConfig(warmup_tokens=10, warmup_samples=0)),
            "optimizer.warmup_tokens=10 and optimizer.warmup_samples=0",
        ),
        (lambda: TrainConfig(control=ControlConfig(schedule_tokens="0:64")), "control.schedule_tokens is given, but"),
        (
            lambda: in_samples(TrainConfig(max_tokens=10), tokens_per_sample=None, task="digits"),
            "task 'digits' does not say how many a sample has: give max_samples",
        ),
        (
            lambda: filled_in(TrainConfig(global_batch_tokens=10), SUGGESTION, world_size=1),
            "global_batch_tokens=10 can be used in `dptrain train` alone: give global_batch_size here",
        ),
        (
            lambda: in_samples(
                TrainConfig(max_tokens=64, max_steps=2, control=ControlConfig(law="constant")),
                tokens_per_sample=8,
                task="gpt",
            ),
            "max_steps=2 and max_samples=8 both give a length",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_setting_to_change(make, message):
    """Both units at once, a task without tokens, and tokens where no task is known, are errors and never ignored."""
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


SUGGESTION = Suggestion(
    learning_rate=0.1, global_batch_size=8, micro_batch_size=4, max_samples=100, eval_every_samples=100
)
