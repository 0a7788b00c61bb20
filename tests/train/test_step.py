"""What a forward pass draws at random: a matter of its place in the stream, whoever runs it and whenever."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from dptrain.train import ControlConfig, Trainer
from tests.replicas import run_replicas
from tests.runs import Killed, Noisy, assert_same, attempt, make_config, noisy, trained

LENGTH, MICRO = 48, 2


def mixed(*, drawn, data=None):
    """A task whose loss mixes samples by weights of numpy and of `random`, and notes (first sample, what it drew)."""
    task = noisy()

    def loss(model, batch):
        features, targets, numbers = batch
        weight, other = float(np.random.beta(0.4, 0.4)), random.random()  # noqa: NPY002 - as users do
        if model.training and len(numbers) == MICRO:
            drawn.append((int(numbers[0]), weight, other))
        return ((model(weight * features + other * features.flip(0)) - targets) ** 2).mean()

    return replace(task, train_data=data or task.train_data, loss=loss)


def settings(folder, **changes):
    return make_config(folder, max_samples=LENGTH, control=ControlConfig(law="constant"), **changes)


def in_rows():
    data = Noisy()
    return TensorDataset(data.features, data.targets, torch.arange(len(data)))


DATA = {"samples": Noisy, "rows": in_rows}


def draw(rank, world_size, folder):
    found = {}
    for name, make in DATA.items():
        drawn = []
        task = partial(mixed, drawn=drawn, data=make())
        Trainer(settings(f"{folder}/{name}-{world_size}"), task=task).run()
        found[name] = drawn[-LENGTH // (MICRO * world_size) :]  # those before are of the check of the task
    return found


def test_numpy_and_random_draw_by_position(tmp_path):
    """Each micro-batch gets numbers of its own, the same on one replica and on two, by samples and by rows."""
    (alone,) = run_replicas(draw, world_size=1, args=(str(tmp_path),))
    shared = run_replicas(draw, world_size=2, args=(str(tmp_path),))
    for name in DATA:
        assert len({numbers for _, *numbers in map(tuple, alone[name]) for numbers in numbers}) == 2 * LENGTH // MICRO
        assert sorted(alone[name]) == sorted(drawn for found in shared for drawn in found[name])
    assert alone["samples"] == alone["rows"]


@pytest.mark.parametrize("name", DATA)
def test_a_resumed_run_draws_the_same(tmp_path, name):
    """Killed and resumed, a run whose loss draws from numpy and `random` ends with the same bits."""
    results = []
    for folder, deaths in (("straight", []), ("killed", [9])):
        for death in [*deaths, None]:
            np.random.seed(1 + len(results))  # noqa: NPY002 - whatever the process did before
            random.seed(1 + len(results))
            task = partial(mixed, drawn=[], data=DATA[name]())
            try:
                attempt(tmp_path / folder, kill_at=death, config=settings(tmp_path / folder), task=task)
            except Killed:
                assert death is not None
        results.append(trained(Path(tmp_path / folder)))
    assert_same(results[1], results[0])


def test_a_loss_that_draws_from_torch_alone_leaves_the_others_alone(tmp_path):
    """They are seeded only where they are drawn from: the cost of it is that of a small layer."""
    drawn, task = [], noisy()
    seed = np.random.seed
    try:
        np.random.seed = lambda value: (drawn.append(value), seed(value))
        Trainer(settings(tmp_path / "run"), task=replace(task, train_data=in_rows())).run()
        few = len(drawn)
        drawn.clear()
        Trainer(settings(tmp_path / "mixed"), task=mixed(drawn=[], data=in_rows())).run()
    finally:
        np.random.seed = seed
    assert len(drawn) == few + LENGTH // MICRO
