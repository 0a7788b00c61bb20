"""Models that data parallelism is bad with: each trains as on one replica, or is refused before training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from dptrain.errors import ConfigError, TaskError
from dptrain.tasks import Task, check_task
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, TrainConfig, Trainer
from tests.replicas import run_replicas
from tests.runs import SUGGESTION_OF_NOISY, Noisy


def loss(model, batch):
    return mse_loss(model(batch[0]), batch[1])


def make_task(model, *, loss=loss):
    return Task(
        name="kind", model=model, train_data=Noisy(), eval_data=Noisy(), loss=loss, suggestion=SUGGESTION_OF_NOISY
    )


class Heads(nn.Module):
    """Has a second head that the loss does not use."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, features):
        return self.used(features)


class Own(nn.Module):
    """Computes its loss by a method."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, features):
        return self.layer(features)

    def compute_loss(self, batch):
        return mse_loss(self.layer(batch[0]), batch[1])


class Shared(nn.Module):
    """Calls one layer twice, each time with its activations computed again in the backward pass."""

    def __init__(self, *, use_reentrant=False):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.use_reentrant = use_reentrant

    def forward(self, features):
        hidden = self.first(features)
        for _ in range(2):
            hidden = checkpoint(self.shared, hidden, use_reentrant=self.use_reentrant).tanh()
        return self.last(hidden)


def batch_normed():
    # Without a bias below the batch norm: its gradient is rounding alone, which Adam divides by its own size.
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


KINDS = {
    "lazy modules": lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(1)),
    "unused parameters": Heads,
    "batch norms": batch_normed,
    "checkpointed twice": Shared,
}


def config(folder, **settings):
    return TrainConfig(
        run_dir=str(folder),
        device="cpu",
        layout_replicas=2,
        control=ControlConfig(law="constant"),
        checkpoint=CheckpointConfig(every_samples=1000),
        log=LogConfig(tracker="none"),
        **settings,
    )


def train(rank, world_size, folder):
    """Train each kind for batches of 8 that leave a rest of one sample, and of three in micro-batches of two."""
    found = {}
    for name, make in KINDS.items():
        for micro, max_samples in ((4, 81), (2, 83)):
            settings = {"global_batch_size": 8, "micro_batch_size": micro, "max_samples": max_samples}
            run_dir = f"{folder}/{name}-{micro}-{world_size}"
            model = {}

            def build(make=make, model=model):
                model["it"] = make()
                return make_task(model["it"])

            summary = Trainer(config(run_dir, **settings), task=build).run()
            state = {key: value.tolist() for key, value in model["it"].state_dict().items()}
            found[name, micro] = (summary["samples_seen"], summary["eval_loss"], state)
    return found


def test_they_train_on_two_replicas_as_on_one(tmp_path):
    """Lazy modules, unused parameters, batch norms, shared layers: all samples are seen; weights and loss agree."""
    (one,) = run_replicas(train, world_size=1, args=(str(tmp_path),), timeout_s=250)
    two, other = run_replicas(train, world_size=2, args=(str(tmp_path),), timeout_s=250)
    for kind, (seen, held_out, state) in one.items():
        assert seen == two[kind][0] == (81 if kind[1] == 4 else 83)
        assert two[kind] == other[kind], kind  # the same bits on both replicas
        assert two[kind][1] == pytest.approx(held_out, rel=1e-5), kind
        for name, value in state.items():
            torch.testing.assert_close(torch.tensor(two[kind][2][name]), torch.tensor(value), rtol=1e-4, atol=1e-5)


def test_one_sample_at_a_time_is_refused_for_batch_norms(tmp_path):
    """A micro-batch of one has no variance."""
    settings = {"global_batch_size": 8, "micro_batch_size": 1, "max_samples": 80}
    with pytest.raises(ConfigError, match="need at least 2 samples at a time"):
        Trainer(config(tmp_path / "run", **settings), task=lambda: make_task(batch_normed()))


@pytest.mark.parametrize(
    ("model", "loss", "sentence"),
    [
        (Own, lambda model, batch: model.compute_loss(batch), "uses model.compute_loss, which the wrapper of several"),
        (Own, lambda model, batch: getattr(model, "module", model).compute_loss(batch), "does not call model"),
        (
            lambda: nn.EmbeddingBag(9, 1, sparse=True),
            lambda model, batch: model(batch[2][:, None]).mean(),
            "sparse gradients",
        ),
        (
            lambda: nn.Linear(4, 1, dtype=torch.complex64),
            lambda model, batch: model(batch[0].to(torch.complex64)).abs().mean(),
            "complex parameters",
        ),
        (
            lambda: nn.ModuleList([nn.Linear(4, 1), nn.LazyLinear(1)]),
            lambda model, batch: model[0](batch[0]).mean(),
            "lazy",
        ),
        # DDP would need static_graph for it, which torch's reducer does not take together with no_sync.
        (lambda: Shared(use_reentrant=True), lambda model, batch: model(batch[0]).mean(), "use_reentrant=False"),
    ],
)
def test_what_replicas_cannot_train_is_refused(model, loss, sentence):
    """A loss past the wrapper, sparse, complex and reentrant gradients, a lazy module without use: a sentence each."""
    with pytest.raises(TaskError, match=sentence):
        check_task(make_task(model(), loss=loss))


def test_unused_parameters_are_named_and_keep_their_values():
    """The check says which, and a lazy module has its parameters after it."""
    assert check_task(make_task(Heads())).unused == {"unused.weight", "unused.bias"}
    lazy = replace(make_task(nn.LazyLinear(1)))
    assert check_task(lazy).unused == frozenset()
    assert lazy.model.weight.shape == (1, 4)
