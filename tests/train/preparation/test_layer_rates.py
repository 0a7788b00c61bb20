"""Learning rates by layer: full at the head, smaller with each block below it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from dptrain.errors import ConfigError
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.tasks import resolve_task
from dptrain.train import OptimizerConfig
from dptrain.train.optimizer import build_optimizer, set_rate
from dptrain.train.preparation.layer_rates import layer_ratios, with_layer_rates


def test_each_block_has_a_part_of_the_rate_above_it():
    """A GPT: 1 at the head, then 1/2, 1/4 in the blocks, 1/8 at the embedding; a chain of layers: 1 at the last."""
    ratios = layer_ratios(Gpt(GptConfig(width=32, depth=2)), decay=0.5)
    assert ratios["output.weight"] == ratios["norm.weight"] == 1
    assert ratios["blocks.1.mlp_in.weight"] == 0.5
    assert ratios["blocks.0.mlp_in.weight"] == 0.25
    assert ratios["embedding.weight"] == 0.125
    chain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Conv1d(1, 1, 1), nn.Linear(3, 1))
    assert layer_ratios(chain, decay=0.1) == pytest.approx(
        {"0.weight": 0.01, "0.bias": 0.01, "2.weight": 0.1, "2.bias": 0.1, "3.weight": 1, "3.bias": 1}
    )


def test_the_optimizer_follows_the_ratios():
    """Whatever rate is set, each group has its part; vectors are not decayed; a frozen part is in no group."""
    task = resolve_task("digits")
    for parameter in task.model[0].parameters():
        parameter.requires_grad_(False)
    optimizer = build_optimizer(
        OptimizerConfig(learning_rate=0.1),
        task.model,
        parameter_groups=with_layer_rates(task, decay=0.5).parameter_groups,
    )
    set_rate(optimizer, 0.02)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.02, 0.1), (0.02, 0.0)]
    task.model[0].requires_grad_(True)
    optimizer = build_optimizer(
        OptimizerConfig(learning_rate=0.1),
        task.model,
        parameter_groups=with_layer_rates(task, decay=0.5).parameter_groups,
    )
    set_rate(optimizer, 0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.02, 0.02]


def test_a_task_with_groups_of_its_own_is_refused():
    """Two ways to say the rates would be one too many."""
    with pytest.raises(ConfigError, match="groups of its own"):
        with_layer_rates(replace(resolve_task("digits"), parameter_groups=list), decay=0.5)
