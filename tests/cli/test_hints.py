"""Each option that other tools have is answered with the right one of dptrain's."""

from __future__ import annotations

import pytest

from dptrain.cli.settings import parse
from dptrain.errors import ConfigError
from tests.cli.test_train import outcome

WRONG_TRIES = [
    ("--lr 3e-4", "--optimizer.learning-rate 3e-4"),
    ("--lr=3e-4", "--optimizer.learning-rate 3e-4"),
    ("--batch-size 64", "--global-batch-size 64"),
    ("--batch_size=64", "--global-batch-size 64"),
    ("--gpus 4", "--replicas 4"),
    ("--wandb", "--log.tracker wandb"),
    ("--compile", "--execution.compile model"),
    ("--fp16", "--precision fp16"),
    ("--task-options width=8", "--task-options.width 8"),
    ("--task_options=width=8,depth=2", "--task-options.width 8"),
    ("--task digits --epochs 3", "--max-samples 4491"),
    ("--epochs=0.5 --task digits", "--max-samples 748"),
    ("--num_train_epochs 2 --task quadratic --task-options.num-samples 1000", "--max-samples 2000"),
    ("--epochs many --task digits", "--max-samples (epochs × samples in the training data)"),
    ("--epochs 3 --task no_such_task", "--max-samples (epochs × samples in the training data)"),
    ("--gradient-accumulation-steps 4", "--global-batch-size = --micro-batch-size"),
    ("--momentum 0.8", "--optimizer.beta1 0.8"),
    ("--static-graph true", "use_reentrant=False"),
    ("--execution.static-graph true", "use_reentrant=False"),
]


@pytest.mark.parametrize(("arguments", "hint"), WRONG_TRIES)
def test_a_wrong_try_gets_the_right_hint(arguments, hint):
    """One sentence that names the option to write, with the value that was given."""
    code, stdout, stderr = outcome(["train", *arguments.split()])
    assert (code, stdout) == (2, "")
    assert hint in stderr
    assert stderr.startswith("dptrain train: ")
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("written", "suggested"),
    [
        ("--lr 3e-4", "--optimizer.learning-rate 3e-4"),
        ("--batch-size 64", "--global-batch-size 64"),
        ("--gpus 4", "--replicas 4"),
        ("--wandb", "--log.tracker wandb"),
        ("--fp16", "--precision fp16"),
        ("--task-options width=8", "--task-options.width 8"),
        ("--task digits --epochs 3", "--task digits --max-samples 4491"),
    ],
)
def test_what_a_hint_suggests_is_accepted(written, suggested):
    """The suggestion is an option that exists, and takes the value."""
    with pytest.raises(ConfigError):
        parse(written.split())
    parse(suggested.split())


def test_a_hint_never_shadows_an_option_that_exists():
    """Every name in the table of hints is one that dptrain does not have."""
    from dptrain.cli.hints import _EPOCHS, _HINTS
    from dptrain.config.settings_file import setting_types

    assert not {*_HINTS, *_EPOCHS} & set(setting_types())
