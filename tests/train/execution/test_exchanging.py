"""What replicas are given beside their own samples: shared samples that are the same for all, and where they begin."""

from __future__ import annotations

import random
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset, default_collate

from dptrain.config.train_config import TrainConfig
from dptrain.control.settings import ControlConfig
from dptrain.data.source import seed_generators
from dptrain.exchange.predictions import Recorder
from dptrain.exchange.settings import ExchangeConfig
from dptrain.models.settings import ModelConfig
from dptrain.tasks import Suggestion, Task
from dptrain.train import Trainer
from dptrain.train.execution.exchanging import shared_loss
from dptrain.train.preparation.distillation import DistilledLoss
from dptrain.train.preparation.hidden_states import hidden_states
from dptrain.train.step import seed_forward
from tests.replicas import run_replicas
from tests.runs import Killed, attempt, make_config, noisy

SUGGESTION = Suggestion(
    learning_rate=0.1, global_batch_size=4, micro_batch_size=4, max_samples=40, eval_every_samples=40
)


class Drawing(Dataset):
    """Each sample with a number from each of the three generators, as an augmentation draws them."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.tensor([float(index), torch.rand(()).item(), np.random.rand(), random.random()])  # noqa: NPY002 - the global one


def collate(samples):
    return default_collate(samples) + torch.rand(())


def mixed(model, batch):
    return model(batch * torch.rand(()) + np.random.rand()).sum()  # noqa: NPY002 - the global one


class Noted(nn.Module):
    """Keeps its inputs."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, inputs):
        self.inputs.append(inputs.clone())
        return inputs.mean(1)


def shared(task):
    """The loss of shared samples."""
    exchange, constant = ExchangeConfig(kind="codistillation"), ControlConfig(law="constant")
    config = TrainConfig(task="digits", seed=3, micro_batch_size=4, exchange=exchange, control=constant)
    cpu = torch.device("cpu")
    seed = partial(seed_forward, config.seed, device=cpu, beside_torch=True)
    return shared_loss(task, config, device=cpu, precision=nullcontext, seed_forward=seed)


def inputs_of(task, *, rank, steps):
    """What a replica's model is called with, its generators being where its own samples have left them."""
    loss, model = shared(task), Noted()
    for number, step in enumerate(steps):
        seed_generators(100 * rank + number)
        loss(model, step)
    return model.inputs


def test_shared_samples_are_equal_where_data_collation_and_loss_draw():
    """On all replicas, and when a step's predictions are made some steps ahead as when they are used."""
    task = Task(
        name="t", model=nn.Linear(4, 1), train_data=Drawing(), loss=mixed, collate=collate, suggestion=SUGGESTION
    )
    for one in (task, replace(task, collate=None)):
        first, second = (inputs_of(one, rank=rank, steps=(4, 5, 4)) for rank in (0, 1))
        for ours, theirs in zip(first, second, strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(first[0], first[2])
        assert not torch.equal(first[0], first[1])


def test_a_teacher_is_not_asked_about_shared_samples():
    """Predictions of the model alone are compared, also where the loss has a teacher and hidden states in it."""
    model, teacher = (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)) for _ in range(2))
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    hidden = hidden_states("0", weight=1.0, model=model, teacher=teacher)
    taught = DistilledLoss(mean_of_squares, teacher, temperature=1.0, weight=0.5, hidden=hidden)
    task = Task(name="t", model=model, train_data=Drawing(), loss=taught, suggestion=SUGGESTION)
    recorder = Recorder(model)
    shared(task)(recorder, 1)
    assert recorder.output.shape == (4, 2)
    assert not calls
    taught(recorder, torch.ones(4, 4))  # a loss that looks for modules by name finds them through a recorder
    assert len(calls) == 1


def mean_of_squares(model, batch):
    return (model(batch) ** 2).mean()


def start_from(rank, world_size, folder):
    """What each member begins with; then a run that is killed, its first weights deleted, and resumed."""
    run = folder / "run"
    model = ModelConfig(weights=str(folder / "weights"))
    exchange, constant = ExchangeConfig(kind="ensemble"), ControlConfig(law="constant")
    config = replace(make_config(run, control=constant), exchange=exchange, model=model, max_samples=60)
    begun = Trainer(config, task=noisy)._bare_model.state_dict()
    with pytest.raises(Killed):
        attempt(run, kill_at=8, config=config)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder / "weights")
    dist.barrier()
    attempt(run, config=config)
    return {name: value.tolist() for name, value in begun.items()}


def test_members_begin_with_the_weights_of_a_folder_and_resume_without_it(tmp_path):
    """Each member reads whatever rank 0 can read, and none needs it once there is a checkpoint."""
    (tmp_path / "weights").mkdir()
    weights = noisy().model.state_dict()
    save_file(weights, tmp_path / "weights" / "model.safetensors")
    for begun in run_replicas(start_from, world_size=2, args=(tmp_path,)):
        assert begun == {name: value.tolist() for name, value in weights.items()}
